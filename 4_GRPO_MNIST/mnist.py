"""讀 MNIST 並核對；資料怎麼做出來的，見 data/mnist_packed/README.md。學演算法不必讀它。"""

import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from google.protobuf.json_format import ParseError

from lesson import LessonError

SHA256 = {  # 四個原始檔案 (解壓縮後) 的雜湊值
    ("train", "images"): "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ("train", "labels"): "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ("test", "images"): "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ("test", "labels"): "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
# 檔案缺了、截斷了、改了一個位元，TFDS (ValueError、OSError)、protobuf (ParseError)、array_record (RuntimeError)、
# zlib 丟出的就是這幾種；別的例外是程式的錯，不該叫人還原檔案
READ_ERRORS = (OSError, RuntimeError, ValueError, ParseError, zlib.error)
RESTORE = "用 git checkout -- 4_GRPO_MNIST/data 還原，或照 4_GRPO_MNIST/data/mnist_packed/README.md 重建"


def require_array_record() -> None:
    """TFDS 用到的時候才匯入 array_record，而且只在 Linux 上替人裝；先匯入，少了它才不會怪到檔案上。"""
    try:
        import array_record.python.array_record_module  # noqa: F401
    except ImportError as error:
        install = "Linux、WSL、Apple 晶片的 macOS 用 pip install array_record 裝；其他平台沒有它，改在 Linux 裡執行"
        raise LessonError(f"讀 MNIST 要用的 array_record 無法匯入 ({error})；{install}", 2) from error


def idx_header(array: np.ndarray) -> bytes:
    """原始 IDX 檔的檔頭：型別 (8 是 uint8)、維度的個數、各維的長度，大端序。"""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()


def read_records(data_dir: Path, split: str) -> dict[str, np.ndarray]:
    """TFDS 讀到的所有紀錄，接成兩個陣列。"""
    try:
        records = list(tfds.builder_from_directory(data_dir).as_data_source(split))
        return {key: np.concatenate([record[key] for record in records]) for key in ("images", "labels")}
    except ModuleNotFoundError as error:
        if error.name != "tensorflow":
            raise
        raise ValueError("features.json 的型別不對") from error  # TFDS 不認得的型別，它去 TensorFlow 裡找


def unreadable(data_dir: Path, reason: str) -> LessonError:
    return LessonError(f"讀不出 {data_dir} 裡的 MNIST ({reason})；{RESTORE}", 2)


def read_split(data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """一個分割的圖片 (N, 784) 與標籤 (N,)，都是 uint8，照原始檔案的順序。

    Raises:
        LessonError: 檔案缺了或壞了，讀不出來，或與原始檔案的雜湊值不符。
    """
    try:
        arrays = read_records(data_dir, split)
    except READ_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise unreadable(data_dir, f"{type(error).__name__}: {reason}") from error
    for key, array in arrays.items():
        digest = hashlib.sha256(idx_header(array) + array.tobytes()).hexdigest()
        if digest != SHA256[split, key]:
            raise unreadable(data_dir, f"{split} 的 {key} 與原始檔案的雜湊值不符")
    return arrays["images"].reshape(len(arrays["images"]), -1), arrays["labels"]


class Split(NamedTuple):
    """images (N, 784) 與 labels (N,)，都是 uint8：像素用到的時候才除以 255，記憶體只要四分之一。"""

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    train: Split
    test: Split


def load(data_dir: Path) -> Data:
    """讀出兩個分割並核對；檔案缺了或壞了，LessonError 說怎麼還原。"""
    require_array_record()
    return Data(*(Split(*map(jnp.asarray, read_split(data_dir, split))) for split in Data._fields))
