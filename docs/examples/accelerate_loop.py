"""Distils a YOLOv3 into a YOLOv3-tiny in a loop of Hugging Face's Accelerate.

accelerate launch accelerate_loop.py --data digits --teacher teacher.pt --out runs/student
"""

import argparse
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import fastkd
from fastkd.yolov3 import DetectionLoss, YOLOv3Tiny
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data import DetectionDataset, collate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with annotations/train.json and images/train")
    parser.add_argument("--teacher", type=Path, required=True, help="file of a trained detector")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.pt and state/")
    parser.add_argument("--resume", action="store_true", help="go on from state/")
    parser.add_argument("--width", type=float, default=1.0, help="factor of the number of channels")
    parser.add_argument("--size", type=int, default=416, help="side of the network's input in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images per step, over all processes")
    parser.add_argument("--epochs", type=int, default=100)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)

    data = DetectionDataset(args.data / "annotations" / "train.json", args.data / "images" / "train", args.size)
    loader = DataLoader(data, args.batch // accelerator.num_processes, shuffle=True, collate_fn=collate)
    detector = YOLOv3Tiny(data.num_classes, args.width).to(accelerator.device)
    criterion = DetectionLoss(detector).to(accelerator.device)
    teacher = load_detector(args.teacher).model.to(accelerator.device)
    backbone, neck = (detector.backbone_levels, teacher.backbone_levels), (detector.neck_levels, teacher.neck_levels)
    distiller = fastkd.Distiller(detector, teacher, backbone=backbone, neck=neck, weight="auto")
    distiller.prepare(
        torch.zeros(1, 3, args.size, args.size, device=accelerator.device)
    )  # adapters, before the optimiser
    optimizer = torch.optim.AdamW([*detector.parameters(), *distiller.parameters()], 1e-3)
    student, distiller, optimizer, loader = accelerator.prepare(detector, distiller, optimizer, loader)
    first = 0
    if args.resume:
        accelerator.load_state(args.out / "state")
        first = json.loads((args.out / "state" / "epochs.json").read_text())

    for epoch in range(first, args.epochs):
        student.train()
        for images, targets, _, _ in loader:
            task = criterion(student(images), targets)[0]
            distill = distiller(images, task_loss=task)
            accelerator.backward(task + distill)
            optimizer.step()
            optimizer.zero_grad()
        means = accelerator.reduce(torch.stack([task.detach(), distill.detach()]), "mean").tolist()
        if accelerator.is_main_process:
            print(json.dumps({"epoch": epoch, "detection": means[0], "distill": means[1]}), flush=True)
            args.out.mkdir(parents=True, exist_ok=True)
            save_detector(detector, args.out / "model.pt", data.class_names, args.size)
        # student, adapters and statistics, optimiser; in torch's format, as safetensors has no place for plain numbers
        accelerator.save_state(args.out / "state", safe_serialization=False)
        if accelerator.is_main_process:
            (args.out / "state" / "epochs.json").write_text(json.dumps(epoch + 1))
    # DistributedDataParallel goes before its process group
    student, distiller, optimizer, loader = accelerator.free_memory(student, distiller, optimizer, loader)
    accelerator.end_training()


if __name__ == "__main__":
    main()
