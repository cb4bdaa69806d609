"""Train the spiral from one seed on the CPU and on the GPU, each in its own process, and compare the losses.

    python -m benchmarks.curves    # in the root

The exit status is 1 if they differ by more than LIMIT anywhere in the 300 epochs.
"""

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
    """Return the loss list of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.curves", "train"]
    done = subprocess.run(command, env=os.environ | {"NNX_GPU": gpu}, stdout=subprocess.PIPE, check=True)
    return numpy.array(json.loads(done.stdout))


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        print(json.dumps(train()))
    else:
        cpu, gpu = curve("0"), curve("1")
        difference = abs(cpu - gpu).max()
        print(f"last loss {cpu[-1]:.6f} on the CPU, {gpu[-1]:.6f} on the GPU")
        print(f"largest difference of {len(cpu)} losses: {difference:.1e} (at most {LIMIT:.0e})")
        sys.exit(not difference <= LIMIT)  # NaN fails
