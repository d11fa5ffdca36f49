"""The order in which a model's jobs are claimed, once more and in plain Python: what queue.lua is judged by."""

from dataclasses import dataclass, field


@dataclass
class Class:
    """Jobs of one priority and lane. `jobs` holds (place, job id, cost) by tenant, sorted."""

    since: int
    time: float = 0
    jobs: dict[str, list[tuple]] = field(default_factory=dict)
    turns: dict[str, float] = field(default_factory=dict)
    rested: dict[str, float] = field(default_factory=dict)


class QueueTwin:
    def __init__(self, ageing):
        self.ageing, self.claims, self.paused = ageing, 0, False
        self.classes: dict[tuple, Class] = {}

    def __len__(self):
        return sum(len(jobs) for cls in self.classes.values() for jobs in cls.jobs.values())

    def put(self, job_id, *, tenant, priority, batch, place, cost):
        cls = self.classes.setdefault((priority, batch), Class(self.claims))
        if tenant not in cls.turns:
            cls.turns[tenant] = max(cls.time, cls.rested.pop(tenant, 0))
            cls.jobs[tenant] = []
        cls.jobs[tenant].append((place, job_id, cost))
        cls.jobs[tenant].sort()

    def drop(self, job_id):
        for name, cls in list(self.classes.items()):
            for tenant, jobs in list(cls.jobs.items()):
                if job_id not in [job[1] for job in jobs]:
                    continue
                jobs[:] = [job for job in jobs if job[1] != job_id]
                if not jobs:
                    cls.rested[tenant] = cls.turns.pop(tenant)
                    del cls.jobs[tenant]
                if not cls.jobs:
                    del self.classes[name]
        if not self.classes:
            self.claims = 0

    def first(self, online):
        """(class, tenant, job id) that a claim looks at first, or None."""
        open_to = {name: cls for name, cls in self.classes.items() if not (online and name[1])}
        if not open_to:
            return None
        passed_over = [name for name, cls in open_to.items() if self.claims - cls.since >= self.ageing]
        # Of equal wait the more urgent: names sort as the scores' ties do.
        name = min(passed_over, key=lambda name: (open_to[name].since, name)) if passed_over else min(open_to)
        cls = open_to[name]
        tenant = min(cls.turns, key=lambda tenant: (cls.turns[tenant], tenant))
        return name, tenant, cls.jobs[tenant][0][1]

    def give(self, name, tenant, job_id):
        cls = self.classes[name]
        (cost,) = (job[2] for job in cls.jobs[tenant] if job[1] == job_id)
        self.claims += 1
        cls.since, cls.time = self.claims, cls.turns[tenant]
        cls.turns[tenant] += cost
        cls.rested = {other: turn for other, turn in cls.rested.items() if turn > cls.time}
        self.drop(job_id)
