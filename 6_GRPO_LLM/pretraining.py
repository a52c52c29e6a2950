"""第 6 課的預訓練：讀很多寫著答案的題目，預測下一個詞元，得到基礎模型。最佳化器也在這裡。"""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import task
from flax import nnx
from model import Transformer, answer_log_probs
from task import PROMPT_LENGTH, Problems
from tqdm import tqdm

from lesson import LessonError

CHUNK = 50  # 幾步編譯成一次呼叫
MAX_GRAD_NORM = 1.0


def language_model_loss(actor: Transformer, texts: tuple[jax.Array, ...]) -> jax.Array:
    """預訓練的損失：答案的每一個詞元的 -log π，平均。提示的數字是隨機的，沒有東西可學，不算。"""
    masks = [task.answer_mask(tokens[:, PROMPT_LENGTH:]) for tokens in texts]
    total = sum(jnp.sum(mask * answer_log_probs(actor, t)) for mask, t in zip(masks, texts, strict=True))
    return -total / sum(jnp.sum(mask) for mask in masks)


text_loss = nnx.jit(language_model_loss)


@functools.cache
def make_optimizer(learning_rate: float, steps: int | None, warmup: int = 0) -> optax.GradientTransformation:
    """Adam，梯度先裁剪；steps 給了就先暖身，再照餘弦降到 0。同樣的參數拿到同一個物件，nnx.jit 才不會重新編譯。"""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps) if steps else learning_rate
    return optax.chain(optax.clip_by_global_norm(MAX_GRAD_NORM), optax.adam(schedule))


def check_finite(losses: np.ndarray, done: int, phase: str) -> None:
    """done 是這之前完成了幾步；有一個不是有限的數，就丟出 LessonError。"""
    if not np.isfinite(losses).all():
        step = done + int(np.argmin(np.isfinite(losses))) + 1
        raise LessonError(f"{phase}第 {step} 步的損失不是有限的數；把學習率調小再試", 1)


@nnx.jit
def pretrain_steps(model: Transformer, optimizer: nnx.Optimizer, texts: tuple[jax.Array, ...]) -> jax.Array:
    """預測下一個詞元；texts 的第一個維度是步，回傳每一步的損失。"""

    def step(carry, batch):
        model, optimizer = carry
        loss, grads = nnx.value_and_grad(language_model_loss)(model, batch)
        optimizer.update(model, grads)
        return carry, loss

    return nnx.scan(step, in_axes=(nnx.Carry, 0))((model, optimizer), texts)[1]


def make_keys(seed: int) -> jax.Array:
    """初始的權重、評論家的輸出層、採樣，各一支互不相干的亂數。"""
    return jax.random.split(jax.random.key(seed, impl="rbg"), 3)  # rbg：採樣與編譯都比 JAX 預設的產生器快


def pretrain(config, stop: threading.Event | None, progress: bool) -> tuple[Transformer, list[float]]:
    """從亂數開始的基礎模型，與每一步的損失；stop 被設定時停在兩段之間。"""
    problems, losses = Problems([config.seed, 0]), []
    init_key, *_ = make_keys(config.seed)
    model = nnx.jit(lambda key: Transformer(config, nnx.Rngs(key)))(init_key)
    tx = make_optimizer(config.pretrain_learning_rate, config.pretrain_steps, warmup=config.pretrain_steps // 20)
    optimizer = nnx.jit(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(model)
    with tqdm(total=config.pretrain_steps, desc="預訓練", unit="步", disable=None if progress else True) as bar:
        while len(losses) < config.pretrain_steps and not (stop and stop.is_set()):
            steps = min(CHUNK, config.pretrain_steps - len(losses))
            texts = problems.texts(steps, *config.text_rows(config.pretrain_batch_size))
            step_losses = np.asarray(pretrain_steps(model, optimizer, texts))
            check_finite(step_losses, len(losses), "預訓練")
            losses += step_losses.tolist()
            bar.set_postfix_str(f"平均損失 {np.mean(losses[-CHUNK:]):.3f}")
            bar.update(steps)
    return model, losses
