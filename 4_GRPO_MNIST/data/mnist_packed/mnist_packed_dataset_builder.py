"""把 MNIST 的四個原始檔案裝成 TFDS 資料集，一筆紀錄 1,000 張圖片；不需要 TensorFlow 與網路。

    python 4_GRPO_MNIST/data/mnist_packed/mnist_packed_dataset_builder.py 原始檔案的資料夾 4_GRPO_MNIST/data

`tfds build` 也認得這個檔案，但那個指令要裝 TensorFlow。
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

IMAGES_PER_RECORD = 1000  # 一張圖一筆紀錄要讀十幾秒；裝在一起只要零點幾秒
FILES = {"train": "train", "test": "t10k"}  # 分割的名字 → 原始檔名的開頭


def read_idx(path: Path, header_bytes: int) -> np.ndarray:
    """IDX 檔：檔頭之後全是 uint8。"""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header_bytes)


class Builder(tfds.core.GeneratorBasedBuilder):
    name = "mnist_packed"  # 當成腳本執行時，TFDS 沒有模組名可以推斷
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "MNIST 的四個 .gz 檔案，檔名如 train-images-idx3-ubyte.gz"

    def _info(self) -> tfds.core.DatasetInfo:
        folder, zlib = Path(__file__).parent, tfds.features.Encoding.ZLIB
        images = tfds.features.Tensor(shape=(IMAGES_PER_RECORD, 28, 28), dtype=np.uint8, encoding=zlib)
        labels = tfds.features.Tensor(shape=(IMAGES_PER_RECORD,), dtype=np.uint8, encoding=zlib)
        return tfds.core.DatasetInfo(
            builder=self,
            description="MNIST，一筆紀錄 1,000 張圖片，照原始檔案的順序",
            citation=(folder / "CITATIONS.bib").read_text(encoding="utf-8"),
            homepage="http://yann.lecun.com/exdb/mnist/",
            license="CC BY-SA 3.0",
            features=tfds.features.FeaturesDict({"images": images, "labels": labels}),
            disable_shuffling=True,  # 紀錄照原始檔案的順序，讀回來才對得上原始檔案的雜湊值
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(dl_manager.manual_dir, name) for split, name in FILES.items()}

    def _generate_examples(self, folder, name: str):
        images = read_idx(Path(folder) / f"{name}-images-idx3-ubyte.gz", header_bytes=16)
        labels = read_idx(Path(folder) / f"{name}-labels-idx1-ubyte.gz", header_bytes=8)
        records = zip(images.reshape(-1, IMAGES_PER_RECORD, 28, 28), labels.reshape(-1, IMAGES_PER_RECORD), strict=True)
        for number, (record_images, record_labels) in enumerate(records):
            yield number, {"images": record_images, "labels": record_labels}


def build(manual_dir: Path, data_dir: Path) -> None:
    """manual_dir 裡的四個檔案 → data_dir/mnist_packed/1.0.0/。"""
    builder = Builder(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:]))
