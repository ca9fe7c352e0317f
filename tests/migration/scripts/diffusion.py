"""Denoising diffusion with an average of the weights."""

import argparse
import copy
import os
import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import ProjectConfiguration, set_seed
from torch.utils.data import DataLoader

from tests.migration.toy import Permuted, UNet, digits

logger = get_logger(__name__, log_level="INFO")


class Ema:
    """The average of the weights of a model."""

    def __init__(self, model, decay):
        self.model, self.decay = copy.deepcopy(model), decay

    @torch.no_grad()
    def step(self, parameters):
        for average, param in zip(self.model.parameters(), parameters, strict=True):
            average.lerp_(param, 1 - self.decay)

    def to(self, device):
        self.model.to(device)

    def state_dict(self):
        return self.model.state_dict()

    def load_state_dict(self, state):
        self.model.load_state_dict(state)


def main(args):
    logging_dir = os.path.join(args.output_dir, "logs")
    project_config = ProjectConfiguration(project_dir=args.output_dir, logging_dir=logging_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_config=project_config,
    )
    if args.seed is not None:
        set_seed(args.seed)
    unet = UNet()
    ema = Ema(unet, 0.9)
    accelerator.register_for_checkpointing(ema)
    weight_dtype = torch.float32
    if accelerator.mixed_precision == "bf16":
        weight_dtype = torch.bfloat16

    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    dataset = digits(60)
    train_dataloader = DataLoader(
        dataset, batch_size=8, sampler=Permuted(dataset), generator=torch.Generator()
    )
    lr_scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, total_iters=6 * accelerator.num_processes
    )
    unet, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )
    ema.to(accelerator.device)
    # the trackers start on the main process
    if accelerator.is_main_process:
        accelerator.init_trackers("diffusion", config=vars(args))

    total = args.gradient_accumulation_steps * accelerator.num_processes
    logger.info(f"  Accumulation over {total} micro-batches", main_process_only=True)
    global_step = 0
    for epoch in range(2):
        train_loss = 0.0
        for step, (images, _) in enumerate(train_dataloader):
            with accelerator.accumulate(unet):
                images = images.to(weight_dtype)
                noise = torch.randn_like(images)
                timesteps = torch.randint(0, 20, (len(images),), device=images.device)
                alpha = (1 - timesteps / 20)[:, None, None, None]
                noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
                model_pred = unet(noisy, timesteps)
                loss = F.mse_loss(model_pred.float(), noise.float(), reduction="mean")

                # the loss of all processes, for the log
                avg_loss = accelerator.gather(loss.repeat(len(images))).mean()
                train_loss += avg_loss.item() / args.gradient_accumulation_steps

                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    params_to_clip = unet.parameters()
                    accelerator.clip_grad_norm_(params_to_clip, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad(set_to_none=True)

            if accelerator.sync_gradients:
                ema.step(unet.parameters())
                global_step += 1
                accelerator.log({"train_loss": train_loss}, step=global_step)
                accelerator.print("loss", train_loss)
                train_loss = 0.0
                if global_step % 3 == 0:
                    if accelerator.is_main_process:
                        save_path = os.path.join(args.output_dir, f"checkpoint-{global_step}")
                        accelerator.save_state(save_path)
                        logger.info(f"Saved state to {save_path}")
            logs = {"step_loss": loss.detach().item(), "lr": lr_scheduler.get_last_lr()[0]}
            accelerator.print("loss", logs["step_loss"], logs["lr"])

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(unet)
        total = sum(weight.abs().sum().item() for weight in unet.parameters())
        average = sum(weight.abs().sum().item() for weight in ema.model.parameters())
        print("loss", total, average)
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", default=None)
    parser.add_argument("--seed", type=int, default=23)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as args.output_dir:
        main(args)
