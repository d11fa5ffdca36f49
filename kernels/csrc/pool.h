// Sharing a loop between threads: the caller works, and helpers join if they get to run.
//
// Unlike an OpenMP team, nobody waits for a helper that has not come: on a machine whose cores are also wanted by
// others (a queue, an API, another model) a barrier over all threads costs a time slice whenever one of them is off
// its core, and a decoding step has a hundred such places.
#pragma once

#include <cstdint>

// Calls work(context, i) once for each i in [0, tasks), on the calling thread and at most threads - 1 helpers, and
// returns when all are done. A call from inside another one, or beside it, runs on its caller alone.
void share_tasks(int64_t tasks, int64_t threads, void (*work)(const void *, int64_t), const void *context);

template <class Work> void share(int64_t tasks, int64_t threads, const Work &work) {
    share_tasks(
        tasks, threads, [](const void *context, int64_t i) { (*static_cast<const Work *>(context))(i); }, &work);
}
