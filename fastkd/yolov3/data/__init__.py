"""Images and boxes: readers of data formats, augmentation, and the data set that a data loader reads."""

from fastkd.yolov3.data.annotations import Annotations
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.data.dataset import DetectionDataset, collate
from fastkd.yolov3.data.formats import find_set, read_set

__all__ = ["Annotations", "Augmentation", "DetectionDataset", "collate", "find_set", "read_set"]
