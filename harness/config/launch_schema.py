"""The sections of the run file that say where and how ranks are started: `launch` and `slurm`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from harness.config.section import Section

Seconds = Annotated[float, Field(gt=0.0)]
_VARIABLE_NAME = r"^[A-Za-z_][A-Za-z0-9_]*$"
_LINE = r"^[^\n\r\x00]*$"  # no way into the next line of a script
_WORD = r"^[^\s'\"\\\x00]+$"
_SLURM_TIME = r"^(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$"
VariableName = Annotated[str, StringConstraints(pattern=_VARIABLE_NAME)]
Line = Annotated[str, StringConstraints(pattern=_LINE)]
Word = Annotated[str, StringConstraints(pattern=_WORD)]
SlurmTime = Annotated[str, StringConstraints(pattern=_SLURM_TIME)]
PATTERNS = {  # what is told of a value that does not match
    _VARIABLE_NAME: "must be the name of a variable",
    _LINE: "must be one line",
    _WORD: "must be one word, without quotes and backslashes",
    _SLURM_TIME: "must be a time limit like 24:00:00 or 2-12:00:00",
}


class PhaseTimeouts(Section):
    meet: Seconds | None = Field(600.0, description="Until all ranks have imported their packages and met.")
    prepare: Seconds | None = Field(None, description="Reading and encoding the rows; null: as long as it takes.")
    load: Seconds | None = Field(3600.0, description="Model, engine and checkpoint, compilation included.")
    step: Seconds | None = Field(1800.0, description="One micro-step.")
    evaluation: Seconds | None = Field(1800.0, description="One batch of an evaluation.")
    save: Seconds | None = Field(3600.0, description="A checkpoint or an export.")


class LaunchConfig(Section):
    processes: Annotated[int, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="Ranks on each machine; auto: one per accelerator (ssh: the slots of the hostfile)."
    )
    backend: Literal["local", "ssh", "slurm"] = Field(
        "local", description="Where ranks are started: this machine, hosts of a hostfile, the nodes of a Slurm job."
    )
    hostfile: str | None = Field(None, description="Hosts of backend ssh, in DeepSpeed's syntax: `name slots=8`.")
    include: str | None = Field(None, description="Hosts and slots to use, as in `node1@node2:0,2` (DeepSpeed).")
    exclude: str | None = Field(None, description="Hosts and slots not to use, same syntax.")
    interface: Word | None = Field(None, description="Network interface of the ranks' traffic; default: their choice.")
    environment: dict[VariableName, str] = Field(
        default_factory=dict, description="Variables set for every rank on every machine."
    )
    node_local_dir: str | None = Field(
        None, description="Directory on each node's own disk for compiled kernels; default: each library's own."
    )
    bind_cores: bool = Field(False, description="Give each rank its own share of a machine's cores.")
    collective_timeout_s: Seconds = Field(600.0, description="Longest wait of one rank for another.")
    stop_grace_s: Seconds = Field(300.0, description="Time to save after a stop signal; then the ranks are killed.")
    heartbeat_timeout_s: Seconds = Field(
        60.0, description="A rank or a node without a sign of life for this long is taken for dead."
    )
    timeouts_s: PhaseTimeouts = Field(
        default_factory=PhaseTimeouts, description="Longest time without progress in each phase of a rank."
    )
    max_restarts: int = Field(
        2, ge=0, description="Restarts in a row after crashes; a new checkpoint refills the budget."
    )


class EvaluationJobConfig(Section):
    data: str | None = Field(None, description="The rows to score; default `data.test`.")
    time: SlurmTime = Field("02:00:00", description="Time limit.")
    gpus_per_node: Annotated[int, Field(gt=0)] | Word | None = Field(None, description="GPUs; null asks for none.")
    memory: Word | None = Field(None, description="Host memory.")
    arguments: list[str] = Field(default_factory=list, description="More arguments of `harness evaluate`.")


class SlurmConfig(Section):
    nodes: int = Field(1, gt=0, description="Nodes of the job.")
    gpus_per_node: Annotated[int, Field(gt=0)] | Word | None = Field(
        None, description="GPUs of each node, as `8` or `a100:8`; null asks for none."
    )
    cpus_per_node: int | None = Field(None, gt=0, description="Cores of each node.")
    memory: Word | None = Field(None, description="Host memory of each node, as `480G`; 0: all of it.")
    first_node_memory: Word | None = Field(
        None, description="Host memory of the first node where it needs more (a heterogeneous job)."
    )
    time: SlurmTime = Field("24:00:00", description="Time limit of one start of the job, as [D-]HH:MM:SS.")
    account: Word | None = Field(None, description="Account that pays.")
    partition: Word | None = Field(None, description="Partition.")
    qos: Word | None = Field(None, description="Quality of service.")
    constraint: Line | None = Field(None, description="Features of the nodes.")
    reservation: Word | None = Field(None, description="Reservation.")
    options: list[Line] = Field(default_factory=list, description="More sbatch options, as `--exclusive`.")
    srun_options: list[Line] = Field(default_factory=list, description="More options of the srun that starts nodes.")
    tasks: Literal["node", "device"] = Field(
        "node", description="One task per node, a supervisor of its ranks, or one per device, the ranks themselves."
    )
    signal_before_s: int = Field(300, gt=0, description="Seconds before the time limit at which SIGUSR2 is sent.")
    modules: list[Word] = Field(default_factory=list, description="Modules to load.")
    setup: list[Line] = Field(default_factory=list, description="Shell lines before the run, on the first node.")
    container: list[str] = Field(
        default_factory=list, description="Words before the command on each node, as [apptainer, exec, --nv, x.sif]."
    )
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="Keys of the run file and their values: an array of all combinations."
    )
    max_parallel: int | None = Field(None, gt=0, description="Tasks of the array that run at a time.")
    evaluation: EvaluationJobConfig | None = Field(
        None, description="A job that scores the exported model once training has ended well."
    )
