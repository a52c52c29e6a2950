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
from dataclasses import asdict, dataclass, field, replace
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
TRAIN_IMAGES = 60_000
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
    """演算法：ppo 用評論家當基線；supervised 直接給答案，拿來對照"""
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
    "batch_size": (2, TRAIN_IMAGES),
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
    if config.compare:
        for variant in variants(config).values():
            check(variant)
    if config.algorithm == "ppo":
        require(
            config.group == "batch" and config.baseline == "group",
            "--algorithm ppo 配上 --group image 或 --baseline moving-average",
            "ppo 的基線是評論家，這兩個旗標只給 grpo 用",
        )
    if config.group == "image":
        require(config.group_size > 1, "--group image 的 --group-size 是 1", "一個答案沒有對象可比，至少要 2")
        require(
            config.baseline == "group",
            f"--group image 配上 --baseline {config.baseline}",
            "移動平均跨過許多批次，只能和 --group batch 一起用",
        )


# 2. 資料：MNIST 是一步就結束的遊戲 -------------------------------------------------------------------

SHA256 = {  # 四個原始檔案 (解壓縮後) 的雜湊值；見 data/mnist_packed/README.md
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
            raise ValueError(f"{split} 的 {key} 與原始檔案的雜湊值不符")
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


# 變異數與 Flax 的預設 (lecun_normal) 相同；均勻分佈的程式編譯起來比較快
Linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())


class Actor(nnx.Module):
    """演員：圖片 (..., 784)，值在 0 到 1 → 猜哪個數字的分佈。"""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, HIDDEN_DIM, rngs=rngs)
        self.fc2 = Linear(HIDDEN_DIM, HIDDEN_DIM, rngs=rngs)
        self.fc_out = Linear(HIDDEN_DIM, out_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> tfd.Categorical:
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return tfd.Categorical(logits=self.fc_out(x))


class Critic(nnx.Module):
    """評論家，只有 --algorithm ppo 才有：圖片 (..., 784) → 預期的獎勵 V(s) (...)。"""

    def __init__(self, in_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, HIDDEN_DIM, rngs=rngs)
        self.fc2 = Linear(HIDDEN_DIM, HIDDEN_DIM, rngs=rngs)
        self.fc_out = Linear(HIDDEN_DIM, 1, rngs=rngs)

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

    不再減一次平均：筆記的標準化會再減，整批共用一個數的基線 (例如移動平均) 會被它蓋掉。
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
    baseline: jax.Array  # 可以廣播成 (G, B)
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
        # rbg：採樣與編譯都比 JAX 預設的產生器快
        self.rng_stream = nnx.Rngs(jax.random.key(config.seed, impl="rbg"))
        updates = config.num_epochs * (TRAIN_IMAGES // config.batch_size) * config.train_epochs
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
        baseline = self.calculate_baseline(states, rewards)
        advantages = relative_advantages(rewards, baseline, self.group)
        return Batch(states, labels, actions, log_probs, reference, rewards, baseline, advantages)

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


class EpochLog(NamedTuple):
    """一輪的紀錄；除了 loss 與 outside，都是每批一個數字。"""

    reward: jax.Array  # 平均獎勵，也就是採樣的準確率
    silent: jax.Array  # 優勢是 0 的答案的比率：它們不會推動任何東西
    residual: jax.Array  # 平均 (獎勵 - 基線)²：基線沒有解釋掉的部分
    loss: jax.Array  # (批次數, K)，每次更新一個
    outside: jax.Array  # (批次數, K)，更新之前，比例在 [1 - ε, 1 + ε] 之外的比率


@functools.partial(nnx.jit, static_argnums=3)
def train_epoch(agent: GRPOAgent, data: Split, order: jax.Array, train_epochs: int) -> EpochLog:
    """一整輪編譯成一次呼叫；order (批次數, B) 是圖片的編號。"""

    def train_batch(agent, indices):
        # 收集
        batch = agent.rollout(data.images[indices] / 255, data.labels[indices])
        # 學習：同一批學 K 遍，然後丟棄
        update = nnx.scan(lambda agent, _: (agent, agent.train_actor(batch)), in_axes=(nnx.Carry, 0))
        _, (loss, outside) = update(agent, jnp.arange(train_epochs))
        silent, residual = jnp.mean(batch.advantages == 0), jnp.mean((batch.rewards - batch.baseline) ** 2)
        return agent, EpochLog(batch.rewards.mean(), silent, residual, loss, outside)

    _, log = nnx.scan(train_batch, in_axes=(nnx.Carry, 0))(agent, order)
    return log


@nnx.jit
def predict(actor: Actor, images: jax.Array) -> jax.Array:
    """貪婪的答案：機率最大的數字，(N,)。"""
    return actor(images / 255).mode()


def evaluate(actor: Actor, data: Split) -> tuple[float, int]:
    """貪婪的準確率 (%)，以及十個數字裡一次都沒猜的有幾個。"""
    guesses = np.asarray(predict(actor, data.images))
    return float(100 * np.mean(guesses == np.asarray(data.labels))), ACTION_DIM - len(np.unique(guesses))


@dataclass
class Result:
    agent: GRPOAgent
    env_steps: int = 0  # 一共採樣了幾個答案；一個答案就是一步的回合
    # 以下每一輪一個數字
    train_accuracy: list[float] = field(default_factory=list)  # 訓練時採樣的準確率 (%)，筆記印的數字
    test_accuracy: list[float] = field(default_factory=list)  # 這一輪之後，測試集上貪婪的準確率 (%)
    missing_digits: list[int] = field(default_factory=list)  # 測試集上一次都不猜的數字有幾個
    silent_shares: list[float] = field(default_factory=list)  # 優勢是 0 的答案的比率
    residuals: list[float] = field(default_factory=list)  # 平均 (獎勵 - 基線)² 除以獎勵的變異數；1 是什麼都沒解釋
    outside_shares: list[float] = field(default_factory=list)  # 最後一遍更新之前，比例在界線之外的比率
    epoch_seconds: list[float] = field(default_factory=list)  # 訓練的秒數，不含評估；第一輪含編譯
    seconds: float = 0.0
    interrupted: bool = False  # 被 Ctrl-C 提早結束


def train(config: Config, data: Data, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 在 data 上訓練一個智慧體；stop 被設定時，做完目前這一輪就停。

    Raises:
        FloatingPointError: 損失變成 NaN 或無限大。
    """
    start = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    agent = GRPOAgent(config)
    result = Result(agent)
    images = len(data.train.labels) // config.batch_size * config.batch_size  # 不足一批的圖片這一輪不用
    with tqdm(total=config.num_epochs, desc="訓練", unit="輪", disable=None if progress else True) as bar:
        while len(result.test_accuracy) < config.num_epochs and not result.interrupted:
            epoch_start = time.perf_counter()
            order = rng.permutation(len(data.train.labels))[:images].reshape(-1, config.batch_size)
            log = EpochLog(*map(np.asarray, train_epoch(agent, data.train, order, config.train_epochs)))
            finite = np.isfinite(log.loss)
            if not finite.all():
                step = len(result.test_accuracy) * finite.size + np.argmin(finite) + 1
                raise FloatingPointError(f"第 {step} 次更新的損失不是有限的數")
            result.epoch_seconds.append(time.perf_counter() - epoch_start)
            result.env_steps += order.size * config.group_size
            accuracy = float(log.reward.mean())
            result.train_accuracy.append(100 * accuracy)
            result.silent_shares.append(float(log.silent.mean()))
            result.residuals.append(float(log.residual.mean()) / max(accuracy * (1 - accuracy), 1e-12))
            result.outside_shares.append(float(log.outside[:, -1].mean()))
            test_accuracy, missing = evaluate(agent.actor, data.test)
            result.test_accuracy.append(test_accuracy)
            result.missing_digits.append(missing)
            bar.set_postfix_str(f"平均獎勵 {accuracy:.4f}，測試集 {test_accuracy:.2f} %")
            bar.update()
            result.interrupted = bool(stop and stop.is_set()) and len(result.test_accuracy) < config.num_epochs
    result.seconds = time.perf_counter() - start
    return result


def array_bytes(tree) -> int:
    """所有陣列一共幾個位元組；純量 (例如最佳化器數步數的那一個) 不算。"""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def memory_bytes(agent: GRPOAgent) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組，從陣列量出來；梯度是真的算一次。"""
    models = [model for model in (agent.actor, agent.critic) if model]
    optimizers = [optimizer for optimizer in (agent.actor_optimizer, agent.critic_optimizer) if optimizer]
    states = jnp.zeros((1, STATE_DIM))
    output = {Actor: lambda actor: actor(states).logits.sum(), Critic: lambda critic: critic(states).sum()}
    return {
        "parameters": array_bytes([nnx.state(model, nnx.Param) for model in models]),
        "gradients": array_bytes([nnx.jit(nnx.grad(output[type(model)]))(model) for model in models]),
        "moments": array_bytes([nnx.state(optimizer) for optimizer in optimizers]),
        "reference": array_bytes(nnx.state(agent.reference, nnx.Param)) if agent.reference else 0,
    }


# 7. 圖 -----------------------------------------------------------------------------------------------


def plot_style() -> None:
    """所有課共用的樣式：白底、色盲也分得清的顏色 (Okabe-Ito)。"""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    figure = {"figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True}
    axes = {"axes.prop_cycle": plt.cycler(color=colors), "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(figure | axes | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_learning_curve(result: Result, config: Config) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    epochs = range(1, len(result.test_accuracy) + 1)
    curves = (
        ("training set, sampled", result.train_accuracy, TRAIN_TARGET, "C0"),
        ("test set, greedy", result.test_accuracy, TEST_TARGET, "C1"),
    )
    for label, accuracy, target, color in curves:
        axes.plot(epochs, accuracy, "o-", color=color, label=f"{label}: {accuracy[-1]:.2f} %")
        axes.axhline(target, color=color, linestyle=":", label=f"target: {target} %")
    axes.set(xlabel="epoch", ylabel="accuracy (%)", title=f"{config.algorithm} on MNIST, groups: {config.group}")
    axes.legend(loc="lower right")
    save_figure(figure, config.out_dir / "learning_curve.png")


def draw_mistakes(agent: GRPOAgent, data: Split, out_dir: Path) -> None:
    """測試集裡猜錯的前 40 張：猜的與真的。"""
    guesses, labels = np.asarray(predict(agent.actor, data.images)), np.asarray(data.labels)
    wrong = np.flatnonzero(guesses != labels)
    figure, panels = plt.subplots(4, 10, figsize=(10, 4.9))
    for axes in panels.flat:
        axes.axis("off")
    for axes, i in zip(panels.flat, wrong, strict=False):
        axes.imshow(np.asarray(data.images[i]).reshape(28, 28), cmap="gray_r")
        axes.set_title(f"guess {guesses[i]}\ntruth {labels[i]}", fontsize=9)
    figure.suptitle(f"{len(wrong)} of {len(labels):,} test images are wrong; the first {min(len(wrong), 40)}")
    save_figure(figure, out_dir / "mistakes.png")


# 8. 比較 ---------------------------------------------------------------------------------------------

BATCH_SIZES = (64, 256, 1024, 4096)
STATE_NAMES = {"parameters": "parameters", "gradients": "gradients", "moments": "Adam moments"}


def variants(config: Config) -> dict[str, Config]:
    """--compare 要跑的設定；batch_… 是筆記的群組：一張圖片一個答案，整批互相比較。"""
    config = replace(config, compare=False, algorithm="grpo", group="batch")
    one_answer = replace(config, group="batch", group_size=1)
    return {
        "notes": replace(config, **NOTES_SETTINGS),
        "default": config,
        "image_4": replace(config, group="image", group_size=4),
        "image_16": replace(config, group="image", group_size=16),
        "ppo": replace(config, algorithm="ppo"),
        "supervised": replace(config, algorithm="supervised", group_size=1, train_epochs=1),
        **{f"batch_{size}": replace(one_answer, batch_size=size) for size in BATCH_SIZES},
    }


def baseline_spreads(actor: Actor, data: Split, seed: int, batches: int = 500) -> dict:
    """固定的策略、一張圖片一個答案：批次的平均獎勵抖動多大，旁邊是公式 √(p(1 - p) / B)。"""
    rng = np.random.default_rng(seed)
    correct = np.exp(nnx.jit(lambda actor: actor(data.images / 255).log_prob(data.labels))(actor))
    p, spreads = float(correct.mean()), {}
    for size in BATCH_SIZES:
        images = rng.integers(len(correct), size=(batches, size))
        rewards = rng.random((batches, size)) < correct[images]
        spreads[f"batch_{size}"] = [float(rewards.mean(axis=1).std()), math.sqrt(p * (1 - p) / size)]
    return spreads


def compare(config: Config, data: Data, stop: threading.Event) -> dict:
    """variants 各跑 COMPARE_SEEDS 個隨機種子；回傳每一種的數字，做完幾個算幾個。"""
    columns = ("train_accuracy", "test_accuracy", "silent_shares", "residuals", "outside_shares", "epoch_seconds")
    rows = {name: {column: [] for column in columns} | {"spreads": []} for name in variants(config)}
    with tqdm(total=COMPARE_SEEDS * len(rows), desc="比較", unit="次訓練") as bar:
        for seed in range(COMPARE_SEEDS):
            for name, variant in variants(replace(config, seed=seed)).items():
                result = train(variant, data, stop, progress=False)
                if stop.is_set():
                    return {name: row for name, row in rows.items() if row["test_accuracy"]}
                for column in columns:
                    rows[name][column].append(getattr(result, column))
                rows[name]["memory_bytes"] = memory_bytes(result.agent)
                if name == "notes":
                    for size, spread in baseline_spreads(result.agent.actor, data.train, seed).items():
                        rows[size]["spreads"].append(spread)
                bar.update()
    return rows


def last(row: dict, column: str) -> np.ndarray:
    """每個隨機種子最後一輪的數字。"""
    return np.array(row[column])[:, -1]


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def comparison_table(rows: dict) -> str:
    """三張 Markdown 表格：各種做法、訓練狀態的位元組、批次大小。"""
    methods, sizes, batches = [], [], []
    for name, row in rows.items():
        train_accuracy, test_accuracy = last(row, "train_accuracy"), last(row, "test_accuracy")
        accuracies = [f"{train_accuracy.mean():.2f}", f"{test_accuracy.mean():.2f}", f"{test_accuracy.min():.2f}"]
        seconds = f"{np.median(row['epoch_seconds']):.2f}"
        if name.startswith("batch_"):
            spread = [f"{x:.4f}" for x in np.mean(row["spreads"], axis=0)]
            batches.append([f"{int(name.removeprefix('batch_')):,}", *spread, *accuracies, seconds])
            continue
        shares = last(row, "residuals").mean(), last(row, "silent_shares").mean(), np.mean(row["outside_shares"])
        shares = [f"{100 * share:.1f} %" for share in shares]
        if name == "supervised":  # 沒有優勢，也沒有比例
            shares = ["—"] * 3
        methods.append([f"`{name}`", *accuracies, *shares, seconds])
        if name in ("default", "ppo", "supervised"):
            states = [row["memory_bytes"][key] for key in STATE_NAMES]
            sizes.append([f"`{name}`", *(f"{size:,}" for size in (*states, sum(states)))])
    accuracy = ["訓練集，採樣 (%)", "測試集，貪婪 (%)", "測試集，最差的種子"]
    return "\n".join(
        [
            markdown_table(["做法", *accuracy, "基線沒解釋的", "優勢是 0 的", "最後一遍越界的", "一輪的秒數"], methods),
            markdown_table(["訓練狀態 (位元組)", "參數", "梯度", "Adam 的動量", "合計"], sizes),
            markdown_table(["批次 B", "基線的標準差", "公式", *accuracy, "一輪的秒數"], batches),
        ]
    )


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：測試集的錯誤率，以及訓練狀態的大小。"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[2, 1])
    for i, name in enumerate(("notes", "default", "image_4", "image_16", "ppo", "supervised")):
        errors = 100 - np.array(rows[name]["test_accuracy"])
        epochs = np.arange(1, errors.shape[1] + 1)
        left.plot(epochs, errors.mean(axis=0), color=f"C{i}", label=f"{name}: {errors[:, -1].mean():.2f} %")
        left.fill_between(epochs, errors.min(axis=0), errors.max(axis=0), color=f"C{i}", alpha=0.15, lw=0)
    left.set(yscale="log", xlabel="epoch", ylabel="greedy error on the test set (%)")
    left.set_title(f"mean and range over {len(rows['default']['test_accuracy'])} seeds")
    left.set_yticks([2, 3, 5, 10, 20, 50], labels=["2", "3", "5", "10", "20", "50"])
    left.minorticks_off()
    left.legend(title="after the last epoch", loc="lower right", bbox_to_anchor=(1, 0.36), ncols=2, fontsize=9)
    for i, name in enumerate(("supervised", "default", "ppo")):
        left_edge = 0.0
        for j, (key, label) in enumerate(STATE_NAMES.items()):
            size = rows[name]["memory_bytes"][key] / 1e6
            right.barh(i, size, left=left_edge, color=f"C{j}", label=label if i == 0 else None)
            left_edge += size
    right.set_yticks(range(3), labels=("supervised", "GRPO (default)", "PPO"))
    right.set(xlabel="megabytes", title="training state", ylim=(-0.5, 3.3))
    right.legend(loc="upper right")
    save_figure(figure, out_dir / "comparison.png")


# 9. 命令列與存檔 -------------------------------------------------------------------------------------


def fail(message: str, status: int) -> NoReturn:
    print(f"錯誤：{message}", file=sys.stderr)
    sys.exit(status)


def require(condition: bool, wrong: str, right: str) -> None:
    """條件不成立就印一行「錯誤：哪裡不對；怎樣才對」，以狀態 2 結束。"""
    if not condition:
        fail(f"{wrong}；{right}", status=2)


def require_bounds(config, bounds: dict) -> None:
    """bounds：欄位 → (下限, 上限)，含兩端；nan 不在任何範圍裡。"""
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        right = f"要是 {low} 以上" if high == math.inf else f"要在 {low} 與 {high} 之間"
        require(low <= value <= high, f"--{name.replace('_', '-')} 是 {value}", right)


def parse_config(config_class, description: str):
    """命令列 → config_class；看不懂就印一行錯誤，以狀態 2 結束，不印 tyro 的方框。"""
    sys.stdout.reconfigure(errors="replace")  # 印不出中文的終端機看到問號，不會中斷
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config_class, description=description)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        detail = " ".join(re.findall(r"│ (.*?) *│", output.getvalue().split("│ ──")[0]))
        fail(f"看不懂命令列 ({detail})；--help 列出每個旗標", status=2)


def prepare_out_dir(out_dir: Path) -> None:
    """建立 out_dir，並確定寫得進去。"""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out_dir).close()
    except OSError as error:
        fail(f"--out-dir {out_dir} 寫不進去 ({error.strerror})；要是可以寫入的資料夾", status=2)


def stop_on_ctrl_c() -> threading.Event:
    """第一次 Ctrl-C 只設旗標，讓訓練停在乾淨的地方；第二次照常中斷。"""
    stop = threading.Event()

    def handler(*_):
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, handler)
    return stop


def save_metrics(config, train_seconds: float, device: dict, **results) -> None:
    """metrics.json：先寫到暫存檔再改名，中途停電也不會留下半個檔案。"""
    packages = ("jax", "flax", "optax", "gymnasium")
    metrics = {
        "lesson": Path(__file__).resolve().parent.name,
        "seed": config.seed,
        "config": asdict(config),
        "seconds": {"train": train_seconds, "total": time.perf_counter() - PROCESS_START},
        "device": device,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        **results,
    }
    temporary = config.out_dir / "metrics.tmp"
    temporary.write_text(
        json.dumps(metrics, ensure_ascii=False, indent=2, default=str, allow_nan=False), encoding="utf-8"
    )
    temporary.replace(config.out_dir / "metrics.json")


def save_weights(module: nnx.Module, path: Path) -> None:
    """權重存成 .npz，一個陣列一個名字，例如 actor/mu/kernel；不用 pickle。"""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    np.savez(path, **{"/".join(name): np.asarray(param[...]) for name, param in flat})


def finish(config, interrupted: bool, progress: str) -> None:
    """最後一行：結果在哪裡；被中斷時結束狀態是 130。"""
    if interrupted:
        print(f"已中斷：{progress}，目前的結果存在 {config.out_dir}")
        sys.exit(130)
    print(f"結果存在 {config.out_dir}")


def main() -> None:
    config = parse_config(Config, "第 4 課：GRPO，不要評論家，用一群答案互相比較")
    check(config)
    prepare_out_dir(config.out_dir)
    stop = stop_on_ctrl_c()
    plot_style()
    device = {"platform": jax.default_backend(), "count": jax.device_count()}
    data = load_mnist()
    if config.compare:
        rows = compare(config, data, stop)
        save_metrics(config, time.perf_counter() - PROCESS_START, device, comparison=rows)
        if rows:
            table = comparison_table(rows)
            (config.out_dir / "comparison.md").write_text(table, encoding="utf-8")
            print(table)
        if len(rows) == len(variants(config)):  # 每一種至少跑完一個隨機種子
            draw_comparison(rows, config.out_dir)
        return finish(config, stop.is_set(), f"完成 {sum(len(row['test_accuracy']) for row in rows.values())} 次訓練")

    result = train(config, data, stop)
    train_accuracy, test_accuracy = result.train_accuracy[-1], result.test_accuracy[-1]
    draw_learning_curve(result, config)
    draw_mistakes(result.agent, data.test, config.out_dir)
    save_weights(result.agent.actor, config.out_dir / "weights.npz")
    results = {"train_accuracy": result.train_accuracy, "test_accuracy": result.test_accuracy}
    results |= {"parameters": sum(x.size for x in jax.tree.leaves(nnx.state(result.agent.actor, nnx.Param)))}
    results |= {"env_steps": result.env_steps, "memory_bytes": memory_bytes(result.agent)}
    results |= {"missing_digits": result.missing_digits, "outside_shares": result.outside_shares}
    results |= {"silent_shares": result.silent_shares, "residuals": result.residuals}
    save_metrics(config, result.seconds, device, **results)
    reached = train_accuracy >= TRAIN_TARGET and test_accuracy >= TEST_TARGET
    figure = f"訓練集採樣 {train_accuracy:.2f} %、測試集貪婪 {test_accuracy:.2f} %"
    print(f"{'達標' if reached else '未達標'}：{figure}（目標 {TRAIN_TARGET} %、{TEST_TARGET} %）")
    finish(config, result.interrupted, f"訓練了 {len(result.test_accuracy)} 輪")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as error:
        fail(f"{error}；把學習率調小再試", status=1)
