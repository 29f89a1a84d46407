"""Trains a YOLOv3-tiny, which stands for the detector that you have, on a folder in COCO's layout.

python plain_loop.py --data digits --out runs/plain
torchrun --nproc-per-node 8 plain_loop.py --data coco --out runs/plain
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

import fastkd
from fastkd.yolov3 import DetectionLoss, YOLOv3Tiny
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data import Augmentation, DetectionDataset, collate


class ModelWithLoss(nn.Module):
    """Detector and losses in one module, so that one DistributedDataParallel has all that is trained."""

    def __init__(self, model: YOLOv3Tiny) -> None:
        super().__init__()
        self.model = model
        self.criterion = DetectionLoss(model)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        losses = {"detection": self.criterion(self.model(images), targets)[0]}
        losses["distill"] = self.distiller(images, task_loss=losses["detection"])
        return losses


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with annotations/train.json and images/train")
    parser.add_argument("--teacher", type=Path, required=True, help="file of a trained detector")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.pt (the detector) and training.pt")
    parser.add_argument("--weights", type=Path, help="file of a detector to start from")
    parser.add_argument("--resume", action="store_true", help="go on from training.pt")
    parser.add_argument("--width", type=float, default=1.0, help="factor of the number of channels")
    parser.add_argument("--size", type=int, default=416, help="side of the network's input in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images per step, over all processes")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each of these")
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on a GPU, bfloat16 on a CPU")
    parser.add_argument("--freeze-batchnorm", action="store_true", help="keep the statistics of --weights")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)

    folder = args.data / "images" / "train"
    data = DetectionDataset(args.data / "annotations" / "train.json", folder, args.size, augmentation=Augmentation())
    sampler = DistributedSampler(data, world, rank)
    loader = DataLoader(data, args.batch // world, sampler=sampler, num_workers=args.workers, collate_fn=collate)

    model = load_detector(args.weights).model if args.weights else YOLOv3Tiny(data.num_classes, args.width)
    training = ModelWithLoss(model).to(device)
    blank = torch.zeros(1, 3, args.size, args.size, device=device)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(blank)
    if rank == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{millions:.2f} million parameters, {flops.get_total_flops() / 1e9:.2f} GFLOPs", file=sys.stderr)
    teacher = load_detector(args.teacher).model.to(device)
    backbone, neck = (model.backbone_levels, teacher.backbone_levels), (model.neck_levels, teacher.neck_levels)
    training.distiller = fastkd.Distiller(model, teacher, backbone=backbone, neck=neck, weight="auto").prepare(blank)
    optimizer = torch.optim.SGD(training.parameters(), args.lr, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs * len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp and device.type == "cuda")
    kept = {"training": training, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    first = 0
    if args.resume:
        saved = torch.load(args.out / "training.pt", map_location=device)
        first = saved["epochs"]
        for name, part in kept.items():
            part.load_state_dict(saved[name])
    parallel = DistributedDataParallel(training) if world > 1 else training

    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        data.set_epoch(epoch)
        training.train()
        if args.freeze_batchnorm:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        for step, batch in enumerate(loader):
            images, targets = batch.images.to(device), batch.targets.to(device)
            with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16, args.amp):
                losses = parallel(images, targets)
            scaler.scale(sum(losses.values())).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(training.parameters(), 100)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()

            values = torch.stack([loss.detach() for loss in losses.values()])
            if world > 1:
                distributed.all_reduce(values)
            if rank == 0:
                means = dict(zip(losses, (values / world).tolist(), strict=True))
                print(json.dumps({"epoch": epoch, "step": step, **means}), flush=True)
        if rank == 0:
            args.out.mkdir(parents=True, exist_ok=True)
            save_detector(model, args.out / "model.pt", data.class_names, args.size)
            states = {name: part.state_dict() for name, part in kept.items()}
            torch.save({"epochs": epoch + 1, **states}, args.out / "training.pt")


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group()
    train(parse_arguments())
    if distributed.is_initialized():
        distributed.destroy_process_group()  # after train, because DistributedDataParallel must be gone by then
