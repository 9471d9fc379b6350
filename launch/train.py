"""The rank script for launchers that start the ranks themselves; each of them runs this once per rank:

    deepspeed launch/train.py RUN.yaml [key.path=value ...]
    torchrun --nproc-per-node 2 launch/train.py RUN.yaml
    srun python launch/train.py RUN.yaml

`harness train RUN.yaml` needs none of them. docs/launch.md says what each launcher can and cannot do.
"""

import sys

from harness.training.rank import main_from_run_file

if __name__ == "__main__":
    # DeepSpeed's launcher adds --local_rank=N, older ones of torch --local-rank=N; LOCAL_RANK says the same.
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith(("--local_rank=", "--local-rank="))]
    sys.exit(main_from_run_file(arguments))
