"""The Celery task `inferfleet.turn`: somebody, carry one job of this model. All it knows is whom to ask."""

from celery import Celery

from inferfleet.tasks import names
from inferfleet.workers.porter import Porter


def register_turns(app: Celery, porter: Porter) -> None:
    """Give the app its turns. One task runs for as long as its job, so Flower and `inspect active` show the jobs."""

    @app.task(name=names.TURN_TASK, ignore_result=True)
    def turn(model: str) -> str:
        return porter.take_turn(model)
