"""One rank of a run, however it was started.

`main` is for ranks that find their plan in the run directory; `main_from_run_file` for launchers that know nothing of
ours (`deepspeed`, `torchrun`, `srun`, bare variables): there rank 0 writes the run directory first.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from harness.errors import ExitCode, HarnessError
from harness.io import heartbeat
from harness.io.atomic import read_json, write_json
from harness.io.faults import fault_point
from harness.launch.environment import RankEnvironment, read_rank_environment
from harness.launch.failures import PEER_LOST
from harness.launch.guard import TOKEN_VARIABLE
from harness.launch.run_directory import completed, opened_run_directory, plan_run
from harness.plan.plan import Plan
from harness.training.stop import StopRequest

_PEER_SIGNS = ("connection closed by peer", "connection reset by peer", "rank 0 could not prepare", "broken pipe")


def main(argv: Sequence[str]) -> int:
    """`python -m harness.training.rank RUN_DIR`: a rank started by our supervisor, which holds the run directory."""
    run_dir = Path(argv[0])
    plan = Plan.from_json(read_json(run_dir / "plan.json"))
    return _run_or_exit(plan, read_rank_environment(), prepare_directory=lambda: None)


def main_from_run_file(argv: Sequence[str]) -> int:
    """`RUN.yaml [key.path=value ...]`: a rank started by somebody else's launcher."""
    try:
        environment = read_rank_environment()
        os.environ.update(environment.variables())  # torch and DeepSpeed read these, whatever the launcher calls them
        plan = plan_run(Path(argv[0]), argv[1:], world_size=environment.world_size)
        result = completed(plan)
    except HarnessError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if result is not None:
        if environment.rank == 0:
            print(result)
        return ExitCode.DONE
    with ExitStack() as held_until_the_end:
        return _run_or_exit(
            plan, environment, prepare_directory=lambda: held_until_the_end.enter_context(opened_run_directory(plan))
        )


def run_rank(plan: Plan, environment: RankEnvironment, stop: StopRequest, prepare_directory: Callable[[], Any]) -> None:
    """Meet the other ranks, prepare the rows once, train, finish."""
    started = time.monotonic()
    from harness.engine.build_ops import build_ops
    from harness.engine.optimizers import needed_ops
    from harness.engine.processes import Processes, find_device, find_store, join, leave
    from harness.training.finish import finish
    from harness.training.loop import train
    from harness.training.prepare import prepare
    from harness.training.session import open_session

    timings = {"import_s": time.monotonic() - started}
    run_dir = Path(plan.run_dir)
    store = find_store(rank=environment.rank, world_size=environment.world_size, store_path=environment.store_path)
    processes = Processes(
        environment.rank, environment.local_rank, environment.world_size, find_device(environment.local_rank), store
    )

    def build() -> None:
        heartbeat.beat("load")
        build_ops(needed_ops(plan.config.optimizer, plan.deepspeed, processes.device.type))

    def prepare_run() -> dict[str, Any]:
        prepare_directory()
        fault_point("prepare")
        with stop.at_once():
            build()
            heartbeat.beat("prepare")
            return prepare(plan.config, run_dir)

    prepare_started = time.monotonic()
    if environment.local_rank == 0 and not processes.is_first:  # what is built may lie on each machine's own disk
        with stop.at_once():
            build()
    heartbeat.beat("prepare")
    prepared = processes.first_rank_prepares(prepare_run)
    timings["prepare_s"] = time.monotonic() - prepare_started
    heartbeat.beat("meet")
    join(processes, timeout_s=plan.config.launch.collective_timeout_s)
    heartbeat.beat("load")
    session = open_session(plan, run_dir, prepared, processes, stop, timings)
    end_reason = "failed"
    try:
        train(session)
        finish(session)
        end_reason = "done"
    except HarnessError as error:
        end_reason = error.what
        raise
    finally:
        session.records.event("stop", session.progress.step, reason=end_reason, world_size=processes.world_size)
        session.records.close()
    leave()


def _run_or_exit(plan: Plan, environment: RankEnvironment, prepare_directory: Callable[[], Any]) -> int:
    """Run the rank; an error is recorded for the supervisor and ends the process at once, so that peers notice."""
    heartbeat.start()
    stop = StopRequest(Path(plan.run_dir))
    stop.listen()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for module in ("torch.distributed", "transformers"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    try:
        run_rank(plan, environment, stop, prepare_directory)
    except BaseException as error:
        record_and_exit(error, Path(plan.run_dir), environment.rank)
    heartbeat.stop()
    return ExitCode.DONE


def record_and_exit(error: BaseException, run_dir: Path, rank: int) -> NoReturn:
    heartbeat.stop()
    code = error.exit_code if isinstance(error, HarnessError) else ExitCode.OTHER
    text = str(error) or type(error).__name__
    is_ours = isinstance(error, HarnessError)
    record = {
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "step": heartbeat.last_step(),
        "kind": PEER_LOST if any(sign in text.lower() for sign in _PEER_SIGNS) else type(error).__name__,
        "exit_code": int(code),
        "message": text,
        "traceback": "" if is_ours else traceback.format_exc(),
    }
    is_recorded = TOKEN_VARIABLE in os.environ  # our supervisor reads it; under other launchers rank 0 speaks
    try:
        if run_dir.is_dir():
            write_json(run_dir / "errors" / f"rank-{rank}.json", record)
    except OSError:
        is_recorded = False
    if not is_ours:
        traceback.print_exc()
    elif not is_recorded and rank == 0:
        print(f"error: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a normal exit would wait for peers in collectives that this rank no longer takes part in


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
