"""Images without annotations, for trainings that need none."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet.datasets import BaseDetDataset
from mmdet.registry import DATASETS


@DATASETS.register_module()
class ImageFiles(BaseDetDataset):
    """Images without annotations.

    Args:
        files (Sequence[str]): Paths of the images.
        classes (Sequence[str], optional): What a detector that reads a text is asked for.
        pipeline (Sequence[dict]): From ``LoadImageFromFile`` to ``PackDetInputs``.
    """

    def __init__(
        self, files: Sequence[str], pipeline: Sequence, classes: Sequence[str] | None = None
    ) -> None:
        self.files, self.asked = list(files), classes
        super().__init__(pipeline=pipeline)

    def load_data_list(self) -> list[dict]:
        text = {'text': tuple(self.asked), 'custom_entities': True} if self.asked else {}
        return [
            {'img_path': str(path), 'img_id': index, 'instances': [], **text}
            for index, path in enumerate(self.files)
        ]
