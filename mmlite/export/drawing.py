"""What was found, drawn over an image with OpenCV alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# BGR, one for each class in turn.
COLORS = np.uint8([(60, 180, 255), (90, 200, 60), (255, 140, 40), (200, 70, 230), (60, 70, 235)])


def class_name(classes: Sequence[str], label: int) -> str:
    """The name of a label, or its number where an edited description has too few names."""
    return classes[label] if label < len(classes) else str(label)


def draw(image: np.ndarray, found: Any, classes: Sequence[str]) -> np.ndarray:
    """Draw boxes, masks, names and scores over an image.

    Args:
        image (np.ndarray): BGR, uint8, shape (h, w, 3); it is not changed.
        found (Detections | Segmentations): In pixels of it. Scores may be None.
        classes (Sequence[str]): Names of the labels.

    Returns:
        np.ndarray: BGR, uint8; small images are enlarged by a whole number.
    """
    import cv2

    factor = max(1, 480 // max(image.shape))  # lines and letters would hide a small image
    picture = image.repeat(factor, 0).repeat(factor, 1)
    thickness = max(2, round(max(picture.shape) / 400))
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, thickness / 4
    masks = getattr(found, 'masks', None)
    for index in reversed(range(len(found.labels))):  # the surest on top
        label = int(found.labels[index])
        color = COLORS[label % len(COLORS)]
        if masks is not None:
            inside = masks[index].repeat(factor, 0).repeat(factor, 1)
            picture[inside] = picture[inside] // 2 + color // 2
        left, top, right, bottom = np.rint(factor * found.boxes[index]).astype(int).tolist()
        cv2.rectangle(picture, (left, top), (right, bottom), color.tolist(), thickness)
        text = class_name(classes, label)
        text += '' if found.scores is None else f' {found.scores[index]:.2f}'
        (width, height), below = cv2.getTextSize(text, font, scale, 1)
        left = max(0, min(left, picture.shape[1] - width))  # letters stay inside the picture
        top = max(top, height + below)
        corner = left + width, top - height - below
        cv2.rectangle(picture, (left, top), corner, color.tolist(), cv2.FILLED)
        ink = (0, 0, 0) if color @ (0.11, 0.59, 0.3) > 110 else (255, 255, 255)
        cv2.putText(picture, text, (left, top - below // 2), font, scale, ink, 1, cv2.LINE_AA)
    return picture
