"""The job `custom`: runs the user's own training program (`custom.command`) under the signals and verdicts of `train`."""

import shutil

from conf.schema import Config
from jobs.distributed import stop_signals
from jobs.programs.supervise import Supervisor


def run(config: Config) -> None:
    """Run the program of this task to its end.

    Raises Stopped if it ended after a request to stop, ProgramFailed if it failed, and ConfigError if it
    cannot be started.
    """
    with stop_signals.watch(config, "custom") as stop:
        supervisor = Supervisor(config, stop)
        try:
            supervisor.run()
        finally:
            shutil.rmtree(supervisor.local, ignore_errors=True)
