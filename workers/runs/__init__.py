"""`inferfleet.run` as an ordinary Celery task: for chains, groups and chords."""
