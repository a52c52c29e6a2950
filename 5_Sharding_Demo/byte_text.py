"""第 5 課的文字：從哪裡來，模型接著寫出什麼。一個位元組一個詞元。"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lesson

PROMPT, WRITTEN = 32, 96  # 給模型看幾個位元組，讓它接著寫幾個


def read_text() -> tuple[np.ndarray, np.ndarray]:
    """這套課程自己的 README：九成訓練，一成評估；單獨複製這個資料夾時，只讀這一課的。"""
    folder = Path(__file__).resolve().parent
    paths = [folder / "README.md", folder.parent / "README.md", *sorted(folder.parent.glob("[0-9]_*/README.md"))]
    text = b"".join(path.read_bytes() for path in dict.fromkeys(paths) if path.is_file())
    if len(text) < 20_000:
        wrong = f"README.md 只有 {len(text)} 個位元組"
        raise lesson.LessonError(f"{wrong}；訓練的文字是課程的 README，要和腳本放在一起", 2)
    return tuple(np.split(np.frombuffer(text, np.uint8).astype(np.int32), [9 * len(text) // 10]))


def write(model: nnx.Module, prompt: jax.Array) -> jax.Array:
    """(PROMPT,) 個詞元 → 接著採樣的 (WRITTEN,) 個；每寫一個，都從最近的 PROMPT 個重新讀起 (快取見第 6 課)。"""
    graphdef, state = nnx.split(model)

    def write_one(window, key):
        logits = nnx.merge(graphdef, state)(window[None])[0, -1]
        token = jax.random.categorical(key, logits).astype(window.dtype)
        return jnp.append(window[1:], token), token

    return jax.lax.scan(write_one, prompt, jax.random.split(jax.random.key(0), WRITTEN))[1]


def decode(tokens: np.ndarray) -> str:
    """位元組 → 字；湊不成字的寫 �，換行與控制字元寫 ·。"""
    text = bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "·" for letter in text)
