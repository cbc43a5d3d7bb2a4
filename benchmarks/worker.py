"""Run one contender of one case in this process and write its result as JSON. run.py starts it."""

from __future__ import annotations

from contenders import measure
from job import Job
from processes import answer

if __name__ == "__main__":
    answer(lambda wanted: measure(Job.from_dict(wanted)))
