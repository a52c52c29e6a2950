"""第 4 課：GRPO，不要評論家，用一群答案互相比較 (模組七)。

問題：PPO 的評論家和演員一樣大。能不能不要它？拿 MNIST 當一步就結束的遊戲：看圖片，猜數字，猜對得 1 分。

    python 4_GRPO_MNIST/grpo_mnist.py                                  訓練 10 輪，每輪之後在測試集上評估
    python 4_GRPO_MNIST/grpo_mnist.py --group image --group-size 16    同一張圖片的 16 個答案互相比較
    python 4_GRPO_MNIST/grpo_mnist.py --algorithm ppo                  對照：PPO，有評論家
    python 4_GRPO_MNIST/grpo_mnist.py --compare                        各種做法各跑五個隨機種子，畫在一起

結果在 outputs/：learning_curve.png、mistakes.png、weights.npz、metrics.json。

出處：GRPO：Shao 等 (2024)，DeepSeekMath，arXiv 2402.03300，式 (3)、(4)。
裁剪：Schulman 等 (2017)，arXiv 1707.06347，式 (7)。MNIST：LeCun 等 (1998)。
"""

import time

PROCESS_START = time.perf_counter()  # 在匯入之前記下：回報的總時間從這裡算起

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import platform
import re
import signal
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tensorflow_datasets as tfds
import tyro
from flax import nnx
from tensorflow_probability.substrates import jax as tfp
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

tfd = tfp.distributions

DATA_DIR = Path(__file__).resolve().parent / "data" / "mnist_packed" / "1.0.0"
STATE_DIM = 784  # 28 × 28 個像素
ACTION_DIM = 10  # 猜 0 到 9
HIDDEN_DIM = 128
TRAIN_TARGET = 97.34  # 最後一輪，訓練集上採樣的準確率 (%)：筆記寫的數字
TEST_TARGET = 97.2  # 最後一輪之後，測試集上貪婪的準確率 (%)
COMPARE_SEEDS = 5

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    algorithm: Literal["grpo", "ppo", "supervised"] = "grpo"
    """演算法：ppo 用評論家當基線；supervised 直接給答案，是這個網路的上限"""
    seed: int = 42
    """隨機種子 (seed)"""
    num_epochs: int = 10
    """訓練集看幾輪"""
    batch_size: int = 256
    """一個批次 (batch) 有幾張不同的圖片"""
    group_size: int = 4
    """每張圖片採樣幾個答案 (G)"""
    group: Literal["batch", "image"] = "batch"
    """誰和誰比：batch 是整個批次的答案，image 是同一張圖片的 G 個答案"""
    baseline: Literal["group", "moving-average"] = "group"
    """grpo 的基線：群組的平均，或以前各批平均的移動平均"""
    train_epochs: int = 4
    """同一批答案學幾遍 (K)"""
    learning_rate: float = 2e-3
    """Adam 的學習率；評論家用同一個"""
    anneal_learning_rate: bool = True
    """學習率照餘弦降到 0"""
    clip_epsilon: float = 0.2
    """裁剪的 ε：比例的界線是 1 - ε 與 1 + ε"""
    beta: float = 0.0
    """KL 散度懲罰的權重 β；參考模型是凍結的初始策略"""
    compare: bool = False
    """各種做法與批次大小，各跑種子 0 到 4，畫在一起"""
    out_dir: Path = Path(__file__).resolve().parent / "outputs"
    """結果放在哪裡"""


# 筆記的設定：一張圖片一個答案，學一遍，學習率固定；--compare 拿它和預設值比。
NOTES_SETTINGS = {
    "batch_size": 1024,
    "group_size": 1,
    "train_epochs": 1,
    "learning_rate": 1e-4,
    "anneal_learning_rate": False,
}

BOUNDS = {  # 每個數值旗標的下限與上限
    "seed": (0, 2**32 - 1),
    "num_epochs": (1, 10_000),
    "batch_size": (2, 60_000),
    "group_size": (1, 1024),
    "train_epochs": (1, 1000),
    "learning_rate": (0, 1),
    "clip_epsilon": (0, 1),
    "beta": (0, 1e6),
}


def check(config: Config) -> None:
    """不合理的值在做任何事之前就拒絕 (結束狀態 2)。"""
    require_bounds(config, BOUNDS)
    answers = config.batch_size * config.group_size
    require(answers <= 2**20, f"一批有 {answers:,} 個答案", "--batch-size × --group-size 不能超過 1,048,576")
    if config.group == "image":
        require(config.group_size > 1, "--group image 的 --group-size 是 1", "一個答案沒有對象可比，至少要 2")
        require(
            config.baseline == "group",
            f"--group image 配上 --baseline {config.baseline}",
            "移動平均跨過許多批次，只能和 --group batch 一起用",
        )


# 2. 資料：MNIST 是一步就結束的遊戲 -------------------------------------------------------------------

SHA256 = {  # 四個原始檔案 (解壓縮後) 公布的校驗碼；見 data/mnist_packed/README.md
    ("train", "images"): "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ("train", "labels"): "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ("test", "images"): "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ("test", "labels"): "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def idx_header(array: np.ndarray) -> bytes:
    """原始 IDX 檔的檔頭：型別 (8 是 uint8)、維度的個數、各維的長度，大端序。"""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()


def read_split(data_dir: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """讀出一個分割並核對：圖片 (N, 784) 與標籤 (N,)，都是 uint8，照原始檔案的順序。"""
    records = list(tfds.builder_from_directory(data_dir).as_data_source(split))
    arrays = {key: np.concatenate([record[key] for record in records]) for key in ("images", "labels")}
    for key, array in arrays.items():
        digest = hashlib.sha256(idx_header(array))
        digest.update(array)
        if digest.hexdigest() != SHA256[split, key]:
            raise ValueError(f"{split} 的 {key} 與公布的校驗碼不符")
    return arrays["images"].reshape(-1, STATE_DIM), arrays["labels"]


class Split(NamedTuple):
    """images (N, 784) 與 labels (N,)，都是 uint8：像素用到的時候才除以 255，記憶體只要四分之一。"""

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    train: Split
    test: Split


def load_mnist(data_dir: Path = DATA_DIR) -> Data:
    """讀出兩個分割；檔案缺了或壞了，印一行怎麼還原，以狀態 1 結束。"""
    try:
        return Data(*(Split(*map(jnp.asarray, read_split(data_dir, split))) for split in ("train", "test")))
    except Exception as error:  # 壞掉的檔案在 TFDS、array_record 或 zlib 裡丟出各種例外
        reason = str(error).strip().split("\n")[0]
        restore = "用 git checkout -- 4_GRPO_MNIST/data 還原，或照 4_GRPO_MNIST/data/mnist_packed/README.md 重建"
        fail(f"讀不出 {data_dir} 裡的 MNIST ({type(error).__name__}: {reason})；{restore}", status=1)


def calculate_rewards(actions: jax.Array, labels: jax.Array) -> jax.Array:
    """猜對 1，猜錯 0；動作 (G, B) 對上標籤 (B,)。"""
    return jnp.where(actions == labels, 1.0, 0.0)


# 3. 網路 ---------------------------------------------------------------------------------------------


class Actor(nnx.Module):
    """演員：圖片 (..., 784)，值在 0 到 1 → 猜哪個數字的分佈。"""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(in_features, HIDDEN_DIM, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN_DIM, HIDDEN_DIM, rngs=rngs)
        self.fc_out = nnx.Linear(HIDDEN_DIM, out_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> tfd.Categorical:
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return tfd.Categorical(logits=self.fc_out(x))


class Critic(nnx.Module):
    """評論家，只有 --algorithm ppo 才有：圖片 (..., 784) → 預期的獎勵 V(s) (...)。"""

    def __init__(self, in_features: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(in_features, HIDDEN_DIM, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN_DIM, HIDDEN_DIM, rngs=rngs)
        self.fc_out = nnx.Linear(HIDDEN_DIM, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc_out(x)[..., 0]


# 4. 優勢與目標 ---------------------------------------------------------------------------------------


def group_baseline(rewards: jax.Array, group: str) -> jax.Array:
    """群組的平均獎勵；rewards 是 (G, B)，回傳 (1, 1) 或 (1, B)。"""
    return rewards.mean(axis=0 if group == "image" else None, keepdims=True)


def relative_advantages(rewards: jax.Array, baseline: jax.Array, group: str) -> jax.Array:
    """相對優勢 (rewards - baseline) / 群組的標準差，形狀 (G, B)；arXiv 2402.03300 第 4.1.2 節。

    不再減一次平均：筆記的標準化會再減，無論用什麼基線都會被它蓋掉。
    整組全對或全錯，標準差是 0，沒有誰比誰好，優勢是 0。
    """
    axis = 0 if group == "image" else None
    advantages = rewards - baseline
    # 直接比大小，不看標準差是不是 0：平均的捨入誤差會讓它變成 1e-8 那樣的數，除下去就成了雜訊
    same = advantages.max(axis, keepdims=True) == advantages.min(axis, keepdims=True)
    return jnp.where(same, 0.0, advantages / jnp.where(same, 1.0, advantages.std(axis, keepdims=True)))


def clipped_objective(ratio, advantage, clip_epsilon):
    """PPO-Clip 的目標，arXiv 1707.06347 式 (7)：兩者取小，越界之後不再有繼續走的誘因。"""
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon)
    return jnp.minimum(ratio * advantage, clipped_ratio * advantage)


def kl_estimate(log_probs, reference_log_probs):
    """KL(π_θ ‖ π_ref) 的估計，arXiv 2402.03300 式 (4)：動作採樣自 π_θ 時無偏，而且每一項都不是負的。"""
    difference = reference_log_probs - log_probs
    return jnp.exp(difference) - difference - 1


# 5. 智慧體 -------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """一個批次：B 張圖片，每張 G 個答案。"""

    states: jax.Array  # (B, 784)，0 到 1
    labels: jax.Array  # (B,)；只有 supervised 拿它學習
    actions: jax.Array  # (G, B)
    log_probs: jax.Array  # (G, B)，採樣當時的 log π_old
    reference_log_probs: jax.Array  # (G, B)；β = 0 時沒有用到
    rewards: jax.Array  # (G, B)
    advantages: jax.Array  # (G, B)


@functools.cache
def make_optimizer(learning_rate: float, decay_steps: int | None):
    """Adam；同樣的參數拿到同一個物件，nnx.jit 才不會為每個智慧體重新編譯。"""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, decay_steps) if decay_steps else learning_rate)


class GRPOAgent(nnx.Module):
    """演員與它的最佳化器；ppo 多一個評論家，β > 0 多一份凍結的參考模型。"""

    def __init__(self, config: Config):
        self.algorithm = config.algorithm
        self.group, self.group_size, self.baseline = config.group, config.group_size, config.baseline
        self.clip_epsilon, self.beta = config.clip_epsilon, config.beta
        self.rng_stream = nnx.Rngs(config.seed)
        updates = config.num_epochs * (60_000 // config.batch_size) * config.train_epochs
        tx = make_optimizer(config.learning_rate, updates if config.anneal_learning_rate else None)
        self.actor = Actor(STATE_DIM, ACTION_DIM, rngs=self.rng_stream)
        self.actor_optimizer = nnx.Optimizer(self.actor, tx, wrt=nnx.Param)
        self.average_reward = nnx.Variable(jnp.zeros(()))  # 移動平均
        self.reference = nnx.clone(self.actor) if config.beta > 0 else None
        self.critic = Critic(STATE_DIM, rngs=self.rng_stream) if config.algorithm == "ppo" else None
        self.critic_optimizer = nnx.Optimizer(self.critic, tx, wrt=nnx.Param) if self.critic else None

    def select_actions_and_log_probs(self, batch_states: jax.Array) -> tuple[jax.Array, jax.Array]:
        """每張圖片採樣 G 個答案：(B, 784) → 動作與 log π_old，各 (G, B)。網路只算一次，G 個答案共用。"""
        action_dist = self.actor(batch_states)
        actions = action_dist.sample(self.group_size, seed=self.rng_stream.sampler())
        return actions, action_dist.log_prob(actions)

    def calculate_baseline(self, states: jax.Array, rewards: jax.Array) -> jax.Array:
        """要從獎勵裡減掉的東西；形狀可以廣播成 (G, B)。"""
        if self.algorithm == "ppo":
            return self.critic(states)
        if self.baseline == "group":
            return group_baseline(rewards, self.group)
        baseline = self.average_reward[...]  # 先用再更新：基線不含這一批，和這一批的動作無關
        self.average_reward[...] = 0.9 * baseline + 0.1 * rewards.mean()
        return baseline

    def rollout(self, states: jax.Array, labels: jax.Array) -> Batch:
        """收集：採樣、給分、算優勢。"""
        actions, log_probs = self.select_actions_and_log_probs(states)
        reference = self.reference(states).log_prob(actions) if self.reference else log_probs
        rewards = calculate_rewards(actions, labels)
        advantages = relative_advantages(rewards, self.calculate_baseline(states, rewards), self.group)
        return Batch(states, labels, actions, log_probs, reference, rewards, advantages)

    def actor_objective(self, actor: Actor, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """GRPO 要最大化的目標，arXiv 2402.03300 式 (3)；以及比例越界的答案有多少。"""
        log_probs = actor(batch.states).log_prob(batch.actions)
        ratio = jnp.exp(log_probs - batch.log_probs)
        objective = clipped_objective(ratio, batch.advantages, self.clip_epsilon)
        if self.beta > 0:
            objective -= self.beta * kl_estimate(log_probs, batch.reference_log_probs)
        return jnp.mean(objective), jnp.mean(jnp.abs(ratio - 1) > self.clip_epsilon)

    def train_actor(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """更新一次；回傳損失，以及更新之前比例越界的比率。"""

        def actor_loss_fn(actor):
            if self.algorithm == "supervised":
                return -jnp.mean(actor(batch.states).log_prob(batch.labels)), 0.0
            objective, outside = self.actor_objective(actor, batch)
            return -objective, outside  # 負號：最佳化器只會往下走

        def critic_loss_fn(critic):
            return jnp.mean((critic(batch.states) - batch.rewards) ** 2)

        if self.critic:
            grads = nnx.grad(critic_loss_fn)(self.critic)
            self.critic_optimizer.update(self.critic, grads)
        (loss, outside), grads = nnx.value_and_grad(actor_loss_fn, has_aux=True)(self.actor)
        self.actor_optimizer.update(self.actor, grads)
        return loss, outside


# 6. 訓練與評估 ---------------------------------------------------------------------------------------


@functools.partial(nnx.jit, static_argnums=3)
def train_epoch(agent: GRPOAgent, data: Split, order: jax.Array, train_epochs: int):
    """一整輪編譯成一次呼叫；order (批次數, B) 是圖片的編號。

    回傳每批的平均獎勵 (批次數,)，以及每次更新的損失與越界比率，各 (批次數, K)。
    """

    def train_batch(agent, indices):
        batch = agent.rollout(data.images[indices] / 255, data.labels[indices])
        update = nnx.scan(lambda agent, _: (agent, agent.train_actor(batch)), in_axes=(nnx.Carry, 0))
        _, (losses, outside) = update(agent, jnp.arange(train_epochs))
        return agent, (batch.rewards.mean(), losses, outside)

    _, results = nnx.scan(train_batch, in_axes=(nnx.Carry, 0))(agent, order)
    return results


@nnx.jit
def predict(actor: Actor, images: jax.Array) -> jax.Array:
    """貪婪的答案：機率最大的數字，(N,)。"""
    return actor(images / 255).mode()


def evaluate(actor: Actor, data: Split) -> float:
    """貪婪的準確率 (%)。"""
    return float(100 * jnp.mean(predict(actor, data.images) == data.labels))


@dataclass
class Result:
    agent: GRPOAgent
    train_accuracy: list[float]  # 每一輪訓練時採樣的準確率 (%)，筆記印的數字
    test_accuracy: list[float]  # 每一輪之後測試集上貪婪的準確率 (%)
    outside_shares: list[float]  # 每一輪裡，最後一遍更新之前，比例在界線之外的比率
    epoch_seconds: list[float]  # 每一輪訓練的秒數，不含評估；第一輪含編譯
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def train(config: Config, data: Data, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 訓練一個智慧體；stop 被設定時，做完目前這一輪就停。

    Raises:
        FloatingPointError: 損失變成 NaN 或無限大。
    """
    start = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    agent = GRPOAgent(config)
    result = Result(agent, [], [], [], [], 0.0, False)
    images = len(data.train.labels) // config.batch_size * config.batch_size  # 不足一批的圖片這一輪不用
    with tqdm(total=config.num_epochs, desc="訓練", unit="輪", disable=None if progress else True) as bar:
        while len(result.test_accuracy) < config.num_epochs and not result.interrupted:
            epoch_start = time.perf_counter()
            order = rng.permutation(len(data.train.labels))[:images].reshape(-1, config.batch_size)
            rewards, losses, outside = map(np.asarray, train_epoch(agent, data.train, order, config.train_epochs))
            if not np.isfinite(losses).all():
                done = len(result.test_accuracy) * losses.size
                raise FloatingPointError(f"第 {done + np.argmin(np.isfinite(losses)) + 1} 次更新的損失不是有限的數")
            result.epoch_seconds.append(time.perf_counter() - epoch_start)
            result.train_accuracy.append(float(100 * rewards.mean()))
            result.outside_shares.append(float(outside[:, -1].mean()))
            result.test_accuracy.append(evaluate(agent.actor, data.test))
            bar.set_postfix_str(f"平均獎勵 {rewards.mean():.4f}，測試 {result.test_accuracy[-1]:.2f} %")
            bar.update()
            result.interrupted = bool(stop and stop.is_set()) and len(result.test_accuracy) < config.num_epochs
    result.seconds = time.perf_counter() - start
    return result


def count_bytes(agent: GRPOAgent) -> dict[str, int]:
    """訓練狀態佔的位元組，從陣列量出來；梯度是真的算一次。"""

    def size(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    models = [model for model in (agent.actor, agent.critic) if model]
    optimizers = [optimizer for optimizer in (agent.actor_optimizer, agent.critic_optimizer) if optimizer]
    states = jnp.zeros((1, STATE_DIM))
    output = {Actor: lambda actor: actor(states).logits.sum(), Critic: lambda critic: critic(states).sum()}
    return {
        "parameters": size([nnx.state(model, nnx.Param) for model in models]),
        "gradients": size([nnx.grad(output[type(model)])(model) for model in models]),
        "adam_moments": size([(opt.opt_state[0].mu, opt.opt_state[0].nu) for opt in optimizers]),
        "reference": size(nnx.state(agent.reference, nnx.Param)) if agent.reference else 0,
    }
