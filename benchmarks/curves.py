"""Train on the spiral with the same seed on the CPU and on the GPU, in separate processes, and compare the losses.

    python -m benchmarks.curves    # in the repository root

The exit status is 1 if any loss in the 300 epochs differs by more than LIMIT.
"""

import argparse
import json
import os
import subprocess
import sys

import numpy

from nnx import SGD, Trainer, TwoLayerNet, spiral

LIMIT = 1e-4


def train():
    trainer = Trainer(TwoLayerNet(2, 10, 3, rng=0), SGD(lr=1.0), rng=0)
    trainer.fit(*spiral.load_data(), max_epoch=300, batch_size=30, eval_interval=10, verbose=False)
    return trainer.loss_list


def curve(gpu):
    """Return the losses of training in a separate process."""
    command = [sys.executable, "-m", "benchmarks.curves", "train"]
    done = subprocess.run(command, env=os.environ | {"NNX_GPU": gpu}, stdout=subprocess.PIPE, check=True)
    return numpy.array(json.loads(done.stdout))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=["train"], help=argparse.SUPPRESS)
    if parser.parse_args().task:
        print(json.dumps(train()))
    else:
        cpu, gpu = curve("0"), curve("1")
        difference = abs(cpu - gpu).max()
        print(f"last loss {cpu[-1]:.6f} on the CPU, {gpu[-1]:.6f} on the GPU")
        print(f"largest difference of {len(cpu)} losses: {difference:.1e} (at most {LIMIT:.0e})")
        sys.exit(not difference <= LIMIT)  # NaN fails
