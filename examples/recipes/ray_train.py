"""Train under Ray Train: Ray places and starts the processes again, Stepguard saves and restores.

python ray_train.py --logdir /shared/runs/digits
"""

import argparse

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from stepguard.torch import Supervisor


def train(config):
    """One process of the training. Ray has joined it to torch.distributed already."""
    torch.manual_seed(1 + torch.distributed.get_rank())
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    dataset = TensorDataset(x, x.sum(1, keepdim=True))
    # Not prepare_data_loader: the Supervisor has to find its place in the loader again.
    loader = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset))
    model = prepare_model(torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sv = Supervisor({"model": model, "optimizer": optimizer}, logdir=config["logdir"], save_model_steps=20)
    with sv.managed_session() as sess:
        for inputs, targets in sess.steps(loader, max_steps=config["steps"]):
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sess.summary({"loss": loss})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--logdir", required=True, help="on a file system that all nodes share")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    TorchTrainer(
        train,
        train_loop_config={"logdir": args.logdir, "steps": args.steps},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=100)),
    ).fit()
