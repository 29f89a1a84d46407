"""YOLOv3 and YOLOv3-tiny, with their loss and weight files. Importing this package needs torch alone."""

from fastkd.yolov3.anchors import HeadLayout, Heads, dataset_anchors, kmeans_anchors
from fastkd.yolov3.boxes import Detections, box_iou, decode, detect
from fastkd.yolov3.darknet import load_weights, save_weights
from fastkd.yolov3.loss import DetectionLoss
from fastkd.yolov3.model import YOLOv3, YOLOv3Tiny

__all__ = [
    "DetectionLoss",
    "Detections",
    "HeadLayout",
    "Heads",
    "YOLOv3",
    "YOLOv3Tiny",
    "box_iou",
    "dataset_anchors",
    "decode",
    "detect",
    "kmeans_anchors",
    "load_weights",
    "save_weights",
]
