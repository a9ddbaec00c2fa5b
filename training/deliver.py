"""What a training recorded and MLflow does not have yet -> MLflow. For a server that did not answer when the training ended.

    python -m training.deliver demo/trainings/aesthetic-scorer-0123456789ab --config conf/demo.yaml

A start of the same training does this too. Delivered twice is delivered once. Exit status 1 when events still wait, 2 for a
mistake, such as a training that is running: it delivers by itself.
"""

from __future__ import annotations

from pathlib import Path

from conf.section import Mistake
from conf.settings import command_line, stop
from training import tracker
from training.journal import Journal


def main() -> None:
    settings, arguments = command_line(__doc__, {"folder": "folder of a training (it holds journal.jsonl)"})
    folder = Path(arguments.folder)
    if not (folder / "journal.jsonl").is_file():
        stop(f"training {folder}: no journal.jsonl there; give the folder of one training, from {settings.training.root}")
    try:
        if arguments.plan:
            journal = Journal(folder)
            print(f"deliver: {journal.pending} of {journal.written} events to deliver to {settings.mlflow.tracking_uri}")
            return
        delivery = tracker.Record(folder, settings.mlflow).settle()
    except Mistake as error:
        stop(str(error))
    if not delivery.delivered:
        print(f"deliver: {delivery.pending} events still wait: {delivery.error}")
        raise SystemExit(1)
    print(f"deliver: all is in run {delivery.run}" + (f"; but {delivery.error}" if delivery.error else ""))


if __name__ == "__main__":
    main()
