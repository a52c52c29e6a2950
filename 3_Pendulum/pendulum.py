"""第 3 課：從 REINFORCE 到 PPO，把單擺甩上去 (模組四、五)。

問題：力矩是連續的，沒辦法對它取 max Q。能不能直接學策略？光靠「分數高就多做」為什麼學不起來？

    python 3_Pendulum/pendulum.py                          訓練 PPO-Clip，評估 100 個回合，畫圖
    python 3_Pendulum/pendulum.py --algorithm reinforce    換成階梯上的另一階
    python 3_Pendulum/pendulum.py --compare                六種演算法各跑五個隨機種子，畫在一張圖
    python 3_Pendulum/pendulum.py --watch 3_Pendulum/outputs/weights.npz    看訓練好的智慧體

結果在 outputs/：learning_curve.png、clipped_objective.png、agent.gif、weights.npz、metrics.json。

出處：REINFORCE：Williams (1992)。GAE：Schulman 等 (2016)，arXiv 1506.02438，式 (11)、(16)。
PPO：Schulman 等 (2017)，arXiv 1707.06347，式 (7) 裁剪、式 (8) KL 懲罰。
"""

import time

PROCESS_START = time.perf_counter()  # 在匯入之前記下：回報的總時間從這裡算起

import contextlib
import functools
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from PIL import Image
from tensorflow_probability.substrates import jax as tfp
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

tfd = tfp.distributions

EPISODE_STEPS = 200  # Pendulum-v1 的時間上限
EVAL_EPISODES = 100
TARGET_RETURN = -175.0
MIN_SIGMA = 1e-3
COMPARE_SEEDS = 5

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Algorithm:
    """階梯的一階：四個開關，每一階只比前一階多打開一個 (最後兩階是兩種鎖，並列)。"""

    critic: bool  # 減掉評論家的 V(s)；關掉時，整個回合的總分是每一步的分數
    gae: bool  # 用 λ 混合評論家的估計與實際獎勵；關掉時 λ = 1，實際獎勵一路加到截斷為止
    reuse: bool  # 同一批資料學 train_epochs 遍；關掉時只學一遍
    lock: Literal["none", "clip", "kl"]  # 限制步伐的安全鎖


ALGORITHMS = {
    "reinforce": Algorithm(critic=False, gae=False, reuse=False, lock="none"),
    "reinforce_baseline": Algorithm(critic=True, gae=False, reuse=False, lock="none"),
    "actor_critic": Algorithm(critic=True, gae=True, reuse=False, lock="none"),
    "ppo_unclipped": Algorithm(critic=True, gae=True, reuse=True, lock="none"),
    "ppo_clip": Algorithm(critic=True, gae=True, reuse=True, lock="clip"),
    "ppo_kl": Algorithm(critic=True, gae=True, reuse=True, lock="kl"),
}


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    algorithm: Literal[*ALGORITHMS] = "ppo_clip"
    """演算法：階梯上的哪一階"""
    seed: int = 42
    """隨機種子 (seed)"""
    total_steps: int = 100_000
    """與環境互動的總步數"""
    num_envs: int = 16
    """同時進行的環境份數"""
    num_steps: int = 200
    """一次收集 (rollout) 裡，每個環境走幾步"""
    train_epochs: int = 10
    """同一批資料學幾遍 (K)"""
    minibatch_size: int = 128
    """小批次 (minibatch) 的樣本數"""
    actor_learning_rate: float = 2e-3
    """演員的學習率"""
    critic_learning_rate: float = 2e-3
    """評論家的學習率"""
    anneal_learning_rate: bool = True
    """學習率線性降到 0"""
    max_grad_norm: float = 0.5
    """梯度範數的上限；1e9 等於不裁剪"""
    gamma: float = 0.99
    """折扣因子 γ"""
    gae_lambda: float = 0.95
    """GAE 的 λ：0 全靠評論家，1 全靠實際回報"""
    clip_epsilon: float = 0.2
    """PPO-Clip 的 ε：比例的界線是 1 - ε 與 1 + ε"""
    beta: float = 1.0
    """PPO-KL 的 β：KL 散度懲罰的權重"""
    normalize_advantages: bool = True
    """在每個小批次裡把優勢標準化 (有評論家時)"""
    normalize_observations: bool = True
    """把觀測縮放到 [-1, 1]"""
    reward_scale: float = 0.1
    """學習時獎勵乘上的倍率；回報的數字不受影響"""
    sigma_bias: float = 1.0
    """sigma 輸出層的初始偏置：1 讓 σ 從 softplus(1) = 1.31 開始"""
    hidden_size: int = 64
    """隱藏層的寬度"""
    compare: bool = False
    """六種演算法與筆記的設定，各跑種子 0 到 4，畫在一起"""
    watch: Path | None = None
    """載入這個權重檔，看智慧體玩一個回合，不訓練"""
    out_dir: Path = Path(__file__).resolve().parent / "outputs"
    """結果放在哪裡"""

    @property
    def rollout_size(self) -> int:
        """一次收集的總步數。"""
        return self.num_envs * self.num_steps

    @property
    def updates_per_rollout(self) -> int:
        """一個學習階段的更新次數；不足一個小批次的樣本這一輪不用。"""
        epochs = self.train_epochs if ALGORITHMS[self.algorithm].reuse else 1
        return epochs * (self.rollout_size // self.minibatch_size)


# 筆記的設定，--compare 拿它和預設值比；其餘 (收集的長度、輸出頭的初始值) 不變。
NOTES_SETTINGS = {
    "actor_learning_rate": 3e-4,
    "critic_learning_rate": 1e-3,
    "minibatch_size": 64,
    "anneal_learning_rate": False,
    "max_grad_norm": 1e9,
    "normalize_observations": False,
    "reward_scale": 1.0,
    "sigma_bias": 0.0,
}

BOUNDS = {  # 每個數值旗標的下限與上限
    "seed": (0, 2**32 - 1),
    "total_steps": (1, math.inf),
    "num_envs": (1, 10_000),
    "num_steps": (1, math.inf),
    "train_epochs": (1, math.inf),
    "minibatch_size": (1, math.inf),
    "actor_learning_rate": (0, 1),
    "critic_learning_rate": (0, 1),
    "max_grad_norm": (0, 1e9),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "clip_epsilon": (0, 1),
    "beta": (0, 1e6),
    "reward_scale": (1e-6, 1e30),
    "sigma_bias": (-100, 100),
    "hidden_size": (1, 10_000),
}


def check(config: Config) -> None:
    """不合理的值在做任何事之前就拒絕 (結束狀態 2)。"""
    require_bounds(config, BOUNDS)
    require(
        config.watch is None or config.watch.is_file(),
        f"--watch 找不到 {config.watch}",
        "要是訓練留下的 weights.npz",
    )
    rollout = f"一次收集是 {config.rollout_size} 步 (num-envs × num-steps)"
    require(
        config.minibatch_size <= config.rollout_size,
        f"--minibatch-size 是 {config.minibatch_size}",
        f"{rollout}，不能更大",
    )
    require(config.total_steps >= config.rollout_size, f"--total-steps 是 {config.total_steps}", f"{rollout}，不能更小")
    require(
        ALGORITHMS[config.algorithm].critic or config.num_steps % EPISODE_STEPS == 0,
        f"--num-steps 是 {config.num_steps}",
        f"reinforce 要看完整個回合才有分數，要是 {EPISODE_STEPS} 的倍數",
    )
    if config.compare:
        for variant in variants(config).values():
            check(variant)


# 2. 環境 ---------------------------------------------------------------------------------------------


def make_envs(num_envs: int) -> gym.vector.VectorEnv:
    """num_envs 份 Pendulum-v1，並記錄每個回合的回報。

    SAME_STEP：回合結束的那一步就重置，於是每一步都是真的；真正的最後一個觀測在 infos["final_obs"]。
    """
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.make_vec("Pendulum-v1", num_envs=num_envs, vectorization_mode="sync", vector_kwargs=same_step)
    return gym.wrappers.vector.RecordEpisodeStatistics(envs, buffer_length=num_envs)


def true_next_states(next_states: np.ndarray, done: np.ndarray, infos: dict) -> np.ndarray:
    """把自動重置後的觀測換回回合真正的最後一個觀測。形狀 (num_envs, 3)。"""
    if done.any():
        next_states = next_states.copy()
        next_states[done] = np.stack(infos["final_obs"][done])
    return next_states


def evaluation_starts() -> np.ndarray:
    """評估用的起點，形狀 (100, 2)：角度 (rad)、角速度 (rad/s)。

    起點幾乎決定一個回合的回報，所以分層抽樣：角度 × 角速度切成 10 × 10 格，每格一個隨機點。
    產生器固定，所有隨機種子與演算法用同一組；訓練從不使用。
    """
    cells = np.stack(np.meshgrid(np.arange(10), np.arange(10), indexing="ij"), axis=-1).reshape(-1, 2)
    points = (cells + np.random.default_rng(0).uniform(size=cells.shape)) / 10
    return (2 * points - 1) * [np.pi, 1.0]


# 3. 網路 ---------------------------------------------------------------------------------------------


# 變異數與 Flax 的預設 (lecun_normal) 相同；均勻分佈的程式編譯起來比較快
Linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())


def observation_scale(config: Config) -> tuple[float, float, float]:
    """觀測 (cos φ、sin φ、角速度 rad/s) 的最大值。"""
    return (1.0, 1.0, 8.0) if config.normalize_observations else (1.0, 1.0, 1.0)


class Body(nnx.Module):
    """演員與評論家各有一個的主幹：觀測 (..., 3) → 特徵 (..., hidden_size)。"""

    def __init__(self, hidden_size: int, scale: tuple[float, ...], rngs: nnx.Rngs):
        self.scale = scale
        self.hidden1 = Linear(3, hidden_size, rngs=rngs)
        self.hidden2 = Linear(hidden_size, hidden_size, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = nnx.relu(self.hidden1(states / jnp.array(self.scale)))
        return nnx.relu(self.hidden2(x))


class Actor(nnx.Module):
    """演員：觀測 (..., 3) → 動作的常態分佈 (...)，單位是力矩 N·m。"""

    def __init__(self, hidden_size: int, scale: tuple[float, ...], sigma_bias: float, rngs: nnx.Rngs):
        self.body = Body(hidden_size, scale, rngs)
        # 兩個輸出頭的權重從 0 開始：第一個策略在每個狀態都一樣，只由偏置決定
        zeros, bias = nnx.initializers.zeros_init(), nnx.initializers.constant(sigma_bias)
        self.mu = Linear(hidden_size, 1, kernel_init=zeros, rngs=rngs)
        self.sigma = Linear(hidden_size, 1, kernel_init=zeros, bias_init=bias, rngs=rngs)

    def __call__(self, states: jax.Array) -> tfd.Normal:
        x = self.body(states)
        mu = self.mu(x)[..., 0]
        sigma = nnx.softplus(self.sigma(x)[..., 0]) + MIN_SIGMA  # 標準差必須是正的
        return tfd.Normal(mu, sigma)


class Critic(nnx.Module):
    """評論家：觀測 (..., 3) → 價值 V(s) (...)，單位是乘過 reward_scale 的獎勵。"""

    def __init__(self, hidden_size: int, scale: tuple[float, ...], rngs: nnx.Rngs):
        self.body = Body(hidden_size, scale, rngs)
        self.value = Linear(hidden_size, 1, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        return self.value(self.body(states))[..., 0]


@functools.partial(nnx.jit, static_argnums=(0, 1, 2))
def new_networks(hidden_size: int, scale: tuple[float, ...], sigma_bias: float, seed: jax.Array):
    """初始化編譯成一次呼叫，比一個一個小運算快一秒。"""
    rngs = nnx.Rngs(jax.random.key(seed))
    return Actor(hidden_size, scale, sigma_bias, rngs), Critic(hidden_size, scale, rngs)


# 4. 記憶：同策略的資料，學完就丟 ---------------------------------------------------------------------


class Transition(NamedTuple):
    """所有環境的同一步；每個欄位的第一個維度是 num_envs。"""

    state: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_state: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    log_prob: np.ndarray
    value: np.ndarray


class Batch(NamedTuple):
    """學習用的資料；收集完是 (步, 環境, …)，學習前攤平成 (樣本, …)。"""

    states: jax.Array
    actions: jax.Array
    log_probs: jax.Array
    advantages: jax.Array
    returns: jax.Array
    old_policy: tfd.Normal | None = None  # 學習階段開始時的策略；PPO-KL 的參考模型


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """廣義優勢估計 (GAE)，arXiv 1506.02438 式 (11)、(16)，從後往前遞迴。

    陣列的形狀都是 (步, 環境)；next_values 是 V(真正的下一個觀測)，截斷的那一步也是。
    終止 (terminated) 之後沒有未來，不自助；截斷 (truncated) 只是時間到了，照樣自助。
    兩者都是回合的邊界，優勢不可以流過去。
    """
    advantages = np.zeros_like(rewards)
    next_advantage = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * (1 - terminated[t]) * next_values[t] - values[t]
        done = terminated[t] | truncated[t]
        next_advantage = delta + gamma * gae_lambda * (1 - done) * next_advantage
        advantages[t] = next_advantage
    return advantages


def episode_return(rewards, gamma):
    """REINFORCE 的分數：每一步都拿到所屬回合從頭算起的折扣回報。形狀 (步, 環境)，步數是 200 的倍數。"""
    episodes = rewards.reshape(-1, EPISODE_STEPS, rewards.shape[1])
    returns = np.tensordot(gamma ** np.arange(EPISODE_STEPS), episodes, axes=(0, 1))
    return np.repeat(returns, EPISODE_STEPS, axis=0).astype(rewards.dtype)


class RolloutBuffer:
    """一次收集的資料。學完就要 clear()：策略變了，舊資料不再是新策略的樣本。"""

    def __init__(self):
        self.transitions: list[Transition] = []

    def add(self, transition: Transition) -> None:
        self.transitions.append(transition)

    def calculate_advantages_and_returns(self, critic: Critic, config: Config) -> Batch:
        """每一步的優勢，以及評論家的正確答案 (returns = 優勢 + V)；形狀 (步, 環境, …)。"""
        steps = Transition(*map(np.stack, zip(*self.transitions, strict=True)))
        algorithm = ALGORITHMS[config.algorithm]
        rewards = (steps.reward * config.reward_scale).astype(np.float32)
        if algorithm.critic:
            next_values = np.asarray(jax.jit(Critic.__call__)(critic, steps.next_state))
            gae_lambda = config.gae_lambda if algorithm.gae else 1.0
            ends = steps.terminated, steps.truncated
            advantages = compute_gae(rewards, steps.value, next_values, *ends, config.gamma, gae_lambda)
        else:
            advantages = episode_return(rewards, config.gamma)
        return Batch(steps.state, steps.action, steps.log_prob, advantages, advantages + steps.value)

    def clear(self) -> None:
        self.transitions.clear()


# 5. 智慧體 -------------------------------------------------------------------------------------------


def clipped_objective(ratio, advantage, clip_epsilon):
    """PPO-Clip 的目標，arXiv 1707.06347 式 (7)：兩者取小，越界之後不再有繼續走的誘因。"""
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon)
    return jnp.minimum(ratio * advantage, clipped_ratio * advantage)


def penalized_objective(ratio, advantage, new_policy, old_policy, beta):
    """PPO-KL 的目標，arXiv 1707.06347 式 (8)；KL 的方向照筆記，是 KL(π_new ‖ π_old)。"""
    return ratio * advantage - beta * tfd.kl_divergence(new_policy, old_policy)


@functools.cache
def make_optimizer(learning_rate: float, decay_steps: int | None, max_grad_norm: float):
    """Adam，先裁剪梯度範數；同樣的參數拿到同一個物件，nnx.jit 才不會為每個智慧體重新編譯。"""
    schedule = optax.linear_schedule(learning_rate, 0.0, decay_steps) if decay_steps else learning_rate
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adam(schedule, eps=1e-5))


@functools.partial(jax.jit, static_argnums=0)
def sample_action(structure, weights, states, seed):
    actor, critic = jax.tree.unflatten(structure, weights)
    policy = actor(states)
    actions = policy.sample(seed=jax.random.key(seed))
    return actions, policy.log_prob(actions), critic(states)


@functools.partial(jax.jit, static_argnums=0)
def mean_action(structure, weights, states):
    actor, _ = jax.tree.unflatten(structure, weights)
    return actor(states).mean()


class PPOAgent(nnx.Module):
    """演員、評論家，以及各自的最佳化器。"""

    def __init__(self, config: Config):
        self.algorithm = ALGORITHMS[config.algorithm]
        self.clip_epsilon = config.clip_epsilon
        self.beta = config.beta
        self.normalize = config.normalize_advantages and self.algorithm.critic
        networks = config.hidden_size, observation_scale(config), config.sigma_bias
        self.actor, self.critic = new_networks(*networks, np.uint32(config.seed))

        updates = config.total_steps // config.rollout_size * config.updates_per_rollout
        decay_steps = updates if config.anneal_learning_rate else None
        actor_tx = make_optimizer(config.actor_learning_rate, decay_steps, config.max_grad_norm)
        critic_tx = make_optimizer(config.critic_learning_rate, decay_steps, config.max_grad_norm)
        self.actor_optimizer = nnx.Optimizer(self.actor, actor_tx, wrt=nnx.Param)
        self.critic_optimizer = nnx.Optimizer(self.critic, critic_tx, wrt=nnx.Param)

    def freeze(self):
        """π_old：目前權重的快照。模組每次進 jax.jit 都要攤平；一次收集只攤平一次，每一步快三分之一。"""
        weights, structure = jax.tree.flatten((self.actor, self.critic))
        return structure, weights

    def select_action(self, frozen, states: np.ndarray, rng: np.random.Generator):
        """NumPy 與 JAX 的橋樑：觀測 (num_envs, 3) → 採樣的動作、舊的對數機率、價值，各 (num_envs,)。"""
        seed = rng.integers(2**32, dtype=np.uint32)
        return map(np.asarray, sample_action(*frozen, states, seed))

    def actor_objective(self, actor: Actor, batch: Batch) -> jax.Array:
        """演員要最大化的目標：每個樣本的比例乘優勢，加上演算法的鎖，取平均。"""
        advantage = batch.advantages
        if self.normalize:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        new_policy = actor(batch.states)
        ratio = jnp.exp(new_policy.log_prob(batch.actions) - batch.log_probs)
        if self.algorithm.lock == "clip":
            objective = clipped_objective(ratio, advantage, self.clip_epsilon)
        elif self.algorithm.lock == "kl":
            objective = penalized_objective(ratio, advantage, new_policy, batch.old_policy, self.beta)
        else:  # ratio = 1 時，它的梯度就是 ∇ log π · 優勢 (4.2)
            objective = ratio * advantage
        return jnp.mean(objective)

    def train_step(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """用一個小批次更新評論家與演員各一次；回傳兩個損失。"""

        def critic_loss_fn(critic):
            return jnp.mean((critic(batch.states) - batch.returns) ** 2)

        def actor_loss_fn(actor):
            return -self.actor_objective(actor, batch)  # 負號：最佳化器只會往下走

        critic_loss = jnp.zeros(())
        if self.algorithm.critic:
            critic_loss, grads = nnx.value_and_grad(critic_loss_fn)(self.critic)
            self.critic_optimizer.update(self.critic, grads)
        actor_loss, grads = nnx.value_and_grad(actor_loss_fn)(self.actor)
        self.actor_optimizer.update(self.actor, grads)
        return actor_loss, critic_loss


@nnx.jit
def learn(agent: PPOAgent, batch: Batch, minibatches: jax.Array):
    """整個學習階段編譯成一次呼叫。batch 的欄位是 (樣本, …)；minibatches (更新次數, 小批次) 是樣本的編號。

    回傳每次更新的兩個損失，以及學完之後，比例在 [1 - ε, 1 + ε] 之外的樣本比率。
    """
    batch = batch._replace(old_policy=agent.actor(batch.states))

    def step(agent, indices):
        return agent, agent.train_step(jax.tree.map(lambda x: x[indices], batch))

    _, losses = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))(agent, minibatches)
    ratio = jnp.exp(agent.actor(batch.states).log_prob(batch.actions) - batch.log_probs)
    return losses, jnp.mean(jnp.abs(ratio - 1) > agent.clip_epsilon)


# 6. 訓練：收集、計算目標、學習、丟棄 -----------------------------------------------------------------


@dataclass
class Result:
    agent: PPOAgent
    env_steps: int
    curve: list[tuple[int, float]]  # (步數, 最近 num_envs 個回合的平均回報)
    outside_shares: list[float]  # 每個學習階段之後，比例在界線之外的樣本比率
    memory_bytes: dict[str, int]  # 訓練時要記住的東西，各佔幾個位元組
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def collect(agent, envs, states, buffer, config, rng) -> np.ndarray:
    """用 π_old 走 num_steps 步，存進 buffer；回傳下一個觀測 (num_envs, 3)。"""
    frozen = agent.freeze()
    for _ in range(config.num_steps):
        actions, log_probs, values = agent.select_action(frozen, states, rng)
        next_states, rewards, terminated, truncated, infos = envs.step(actions[:, None])
        true_next = true_next_states(next_states, terminated | truncated, infos)
        buffer.add(Transition(states, actions, rewards, true_next, terminated, truncated, log_probs, values))
        states = next_states
    return states


def array_bytes(tree) -> int:
    """所有陣列一共幾個位元組；純量 (例如最佳化器數步數的那一個) 不算。"""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def memory_bytes(agent: PPOAgent, batch: Batch) -> dict[str, int]:
    """訓練時要記住的東西，各佔幾個位元組。"""
    parameters = array_bytes(nnx.state((agent.actor, agent.critic), nnx.Param))
    moments = array_bytes(nnx.state((agent.actor_optimizer, agent.critic_optimizer)))
    return {"parameters": parameters, "gradients": parameters, "moments": moments, "data": array_bytes(batch)}


def train(config: Config, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 訓練一個智慧體；stop 被設定時，停在兩次收集之間。

    Raises:
        FloatingPointError: 損失變成 NaN 或無限大。
    """
    start = time.perf_counter()
    rng = np.random.default_rng(config.seed)
    agent, buffer, envs = PPOAgent(config), RolloutBuffer(), make_envs(config.num_envs)
    states, _ = envs.reset(seed=config.seed)
    curve, outside_shares, env_steps, batch = [], [], 0, None

    rollout, minibatch = config.rollout_size, config.minibatch_size
    epochs = config.updates_per_rollout // (rollout // minibatch)
    used = rollout // minibatch * minibatch
    total = config.total_steps // rollout * rollout
    with tqdm(total=total, desc="訓練", unit="步", disable=None if progress else True) as bar:
        while env_steps < total and not (stop and stop.is_set()):
            # 收集 (rollout)
            states = collect(agent, envs, states, buffer, config, rng)
            env_steps += rollout
            # 計算目標
            batch = buffer.calculate_advantages_and_returns(agent.critic, config)
            # 學習
            samples = jax.tree.map(lambda x: x.reshape(rollout, *x.shape[2:]), batch)
            order = np.concatenate([rng.permutation(rollout)[:used] for _ in range(epochs)])
            losses, outside = learn(agent, samples, order.reshape(-1, minibatch))
            # 丟棄
            buffer.clear()

            if not np.isfinite(losses).all():
                raise FloatingPointError(f"第 {env_steps} 步的損失不是有限的數")
            outside_shares.append(float(outside))
            if envs.return_queue:
                curve.append((env_steps, float(np.mean(envs.return_queue))))
                bar.set_postfix_str(f"平均回報 {curve[-1][1]:.0f}")
            bar.update(rollout)
    envs.close()
    seconds, memory = time.perf_counter() - start, memory_bytes(agent, batch)
    return Result(agent, env_steps, curve, outside_shares, memory, seconds, env_steps < total)


# 7. 評估 ---------------------------------------------------------------------------------------------


def evaluate(agent: PPOAgent) -> np.ndarray:
    """用平均動作玩 100 個回合，起點見 evaluation_starts；回傳 (100,) 個回報。"""
    envs = make_envs(EVAL_EPISODES)
    envs.reset(seed=0)
    for env, start in zip(envs.unwrapped.envs, evaluation_starts(), strict=True):
        env.unwrapped.state = start
    states = np.stack([env.unwrapped._get_obs() for env in envs.unwrapped.envs])
    frozen = agent.freeze()
    for _ in range(EPISODE_STEPS):
        states, *_ = envs.step(np.asarray(mean_action(*frozen, states))[:, None])
    envs.close()
    return np.array(envs.return_queue)


def play(agent: PPOAgent, render_mode: str) -> list[np.ndarray]:
    """從垂直向下的靜止狀態，用平均動作玩一個回合；rgb_array 時回傳每兩步一張的畫面。"""
    if render_mode == "rgb_array":
        os.environ["SDL_VIDEODRIVER"] = "dummy"  # 不開視窗，請 SDL 不要找螢幕
    env = gym.make("Pendulum-v1", render_mode=render_mode)
    env.reset(seed=0)
    env.unwrapped.state = np.array([np.pi, 0.0])
    state, frozen, frames = np.array([-1.0, 0.0, 0.0], np.float32), agent.freeze(), []
    for step in range(EPISODE_STEPS):
        state, *_ = env.step(np.asarray(mean_action(*frozen, state[None])))
        if render_mode == "rgb_array" and step % 2 == 0:
            frames.append(env.render())
    env.close()
    return frames


# 8. 圖 -----------------------------------------------------------------------------------------------


def plot_style() -> None:
    """所有課共用的樣式：白底、色盲也分得清的顏色 (Okabe-Ito)。"""
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    figure = {"figure.dpi": 110, "figure.facecolor": "white", "figure.constrained_layout.use": True}
    axes = {"axes.prop_cycle": plt.cycler(color=colors), "axes.spines.top": False, "axes.spines.right": False}
    plt.rcParams.update(figure | axes | {"axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})


def save_figure(figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def draw_learning_curve(result: Result, eval_mean: float, config: Config) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    if result.curve:
        axes.plot(*zip(*result.curve, strict=True), label="training episodes (sampled actions)")
    axes.axhline(eval_mean, color="C2", linestyle="--", label=f"evaluation, mean action: {eval_mean:.1f}")
    axes.axhline(TARGET_RETURN, color="0.4", linestyle=":", label=f"target: {TARGET_RETURN:.0f}")
    axes.set(xlabel="environment steps", ylabel="mean return", title=f"{config.algorithm} on Pendulum-v1")
    axes.legend(loc="lower right")
    save_figure(figure, config.out_dir / "learning_curve.png")


def draw_clipped_objective(config: Config) -> None:
    """優勢為正、為負時，PPO-Clip 的目標隨比例怎麼變。"""
    epsilon, ratio = config.clip_epsilon, np.linspace(0, 2, 401)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, advantage in zip(panels, (1.0, -1.0), strict=True):
        axes.axvspan(1 - epsilon, 1 + epsilon, color="0.9", label="1 − ε to 1 + ε")
        axes.plot(ratio, ratio * advantage, "--", color="C1", label="no lock: ratio × advantage")
        axes.plot(ratio, clipped_objective(ratio, advantage, epsilon), color="C0", lw=2.5, label="PPO-Clip")
        axes.plot(1, advantage, "o", color="black", label="every update starts here")
        axes.set(xlabel="ratio = π_new / π_old", title=f"advantage {'> 0' if advantage > 0 else '< 0'}")
    panels[0].set_ylabel("objective (maximised)")
    panels[0].legend(loc="upper left")
    save_figure(figure, config.out_dir / "clipped_objective.png")


def save_gif(frames: list[np.ndarray], path: Path) -> None:
    """寬高各縮一半，存成 GIF，一張 60 毫秒。"""
    images = [Image.fromarray(frame[::2, ::2]).quantize(32) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)


# 9. 比較 ---------------------------------------------------------------------------------------------


def variants(config: Config) -> dict[str, Config]:
    """--compare 要跑的設定：六種演算法，加上筆記的設定。"""
    config = replace(config, compare=False)
    algorithms = {name: replace(config, algorithm=name) for name in ALGORITHMS}
    return algorithms | {"notes": replace(config, algorithm="ppo_clip", **NOTES_SETTINGS)}


def gradient_variances(config: Config, stop: threading.Event, rollouts: int = 10) -> dict[str, float]:
    """同一個策略、同一批回合，只換「分數」：每種演算法的策略梯度估計值的變異數。

    策略是 ppo_clip 用四分之一的步數練出來的。一個回合給一個估計值 g = 平均(∇ log π · 分數)，
    分數不標準化；變異數是各個參數的變異數加總。
    """
    config = replace(config, algorithm="ppo_clip", num_steps=EPISODE_STEPS)
    agent = train(replace(config, total_steps=config.total_steps // 4), stop, progress=False).agent
    envs, buffer, rng = make_envs(config.num_envs), RolloutBuffer(), np.random.default_rng(config.seed)
    states, _ = envs.reset(seed=config.seed)

    @nnx.jit
    @functools.partial(nnx.vmap, in_axes=(None, 1))
    def episode_gradient(actor, batch):
        return nnx.grad(lambda actor: jnp.mean(actor(batch.states).log_prob(batch.actions) * batch.advantages))(actor)

    gradients = {name: [] for name in ALGORITHMS}
    for _ in range(rollouts):
        states = collect(agent, envs, states, buffer, config, rng)
        for name in ALGORITHMS:
            batch = buffer.calculate_advantages_and_returns(agent.critic, replace(config, algorithm=name))
            leaves = jax.tree.leaves(episode_gradient(agent.actor, batch))
            gradients[name].append(np.concatenate([g.reshape(config.num_envs, -1) for g in leaves], axis=1))
        buffer.clear()
    envs.close()
    return {name: float(np.concatenate(g).var(axis=0, ddof=1).sum()) for name, g in gradients.items()}


def compare(config: Config, stop: threading.Event) -> dict:
    """variants 各跑 COMPARE_SEEDS 個隨機種子；回傳每一種的曲線與數字，做完幾個算幾個。"""
    columns = ("curves", "eval_means", "outside_shares", "gradient_variances")
    rows = {name: {column: [] for column in columns} for name in variants(config)}
    with tqdm(total=COMPARE_SEEDS * len(rows), desc="比較", unit="次訓練") as bar:
        for seed in range(COMPARE_SEEDS):
            for name, variance in gradient_variances(replace(config, seed=seed), stop).items():
                rows[name]["gradient_variances"].append(variance)
            for name, variant in variants(replace(config, seed=seed)).items():
                result = train(variant, stop, progress=False)
                if stop.is_set():
                    return {name: row for name, row in rows.items() if row["eval_means"]}
                rows[name]["curves"].append(result.curve)
                rows[name]["eval_means"].append(float(evaluate(result.agent).mean()))
                rows[name]["outside_shares"].append(float(np.mean(result.outside_shares)))
                bar.update()
    return rows


def relative_variance(rows: dict, name: str) -> float:
    """策略梯度估計值的變異數，以 reinforce 為 1。"""
    return np.mean(rows[name]["gradient_variances"]) / np.mean(rows["reinforce"]["gradient_variances"])


def comparison_table(rows: dict) -> str:
    """Markdown 表格；回報是各個隨機種子的評估平均。"""
    lines = [
        "| 演算法 | 平均回報 | 最差的種子 | 梯度變異數 (reinforce = 1) | 學習後比例越界 |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        means = row["eval_means"]
        variance = f"{relative_variance(rows, name):.2g}" if row["gradient_variances"] else "—"
        share = f"{100 * np.mean(row['outside_shares']):.1f} %"
        lines.append(f"| `{name}` | {np.mean(means):.1f} | {min(means):.1f} | {variance} | {share} |")
    return "\n".join(lines) + "\n"


def draw_curves(axes, label: str, curves: list, color: str) -> None:
    """各個隨機種子的平均，加上最差到最好的色帶。"""
    steps, values = np.array(curves[0])[:, 0], np.array(curves)[:, :, 1]
    axes.plot(steps, values.mean(axis=0), label=label, color=color)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, lw=0)
    axes.set(xlabel="environment steps", ylabel="mean return of training episodes")


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：學習曲線與梯度的變異數；notes_settings.png：筆記的設定與這裡的預設值。"""
    seeds = len(rows["notes"]["curves"])  # 最後一列；它有幾個，別的至少有幾個
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[2, 1])
    for i, name in enumerate(ALGORITHMS):
        draw_curves(left, name, rows[name]["curves"], f"C{i}")
        right.bar_label(right.barh(name, relative_variance(rows, name), color=f"C{i}"), fmt="%.2g", padding=3)
    left.set_title(f"Pendulum-v1: mean and range over {seeds} seeds")
    left.legend(loc="upper left", fontsize=9)
    right.set(xscale="log", xlim=(1e-3, 5), xlabel="reinforce = 1", title="variance of the policy gradient")
    right.invert_yaxis()
    save_figure(figure, out_dir / "comparison.png")

    figure, axes = plt.subplots(figsize=(7, 4))
    draw_curves(axes, "defaults of this lesson", rows["ppo_clip"]["curves"], "C0")
    draw_curves(axes, "settings of the notes", rows["notes"]["curves"], "C1")
    axes.set_title(f"ppo_clip: mean and range over {seeds} seeds")
    axes.legend(loc="lower right")
    save_figure(figure, out_dir / "notes_settings.png")


# 10. 命令列與存檔 ------------------------------------------------------------------------------------


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


def has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


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


def load_weights(module: nnx.Module, path: Path) -> None:
    """把 save_weights 的檔案讀回 module；檔案不對就以狀態 2 結束。"""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
                array = arrays["/".join(name)]
                if array.shape != param.shape:
                    raise ValueError(f"{'/'.join(name)} 的形狀是 {array.shape}，這裡要 {param.shape}")
                param[...] = jnp.asarray(array)
    except (OSError, ValueError, KeyError) as error:
        fail(f"--watch {path} 讀不出這一課的權重 ({error})；要是同樣的旗標訓練出來的 weights.npz", status=2)


def watch(play, agent, config) -> None:
    """載入 config.watch 的權重，在視窗裡玩一個回合；沒有螢幕就寫成 GIF。"""
    load_weights(agent, config.watch)
    if has_display():
        play(agent, "human")
    else:
        save_gif(play(agent, "rgb_array"), config.out_dir / "agent.gif")
        print(f"沒有螢幕，畫面存在 {config.out_dir / 'agent.gif'}")


def finish(config, interrupted: bool, progress: str) -> None:
    """最後一行：結果在哪裡；被中斷時結束狀態是 130。"""
    if interrupted:
        print(f"已中斷：{progress}，目前的結果存在 {config.out_dir}")
        sys.exit(130)
    print(f"結果存在 {config.out_dir}")


def main() -> None:
    config = parse_config(Config, "第 3 課：從 REINFORCE 到 PPO，把單擺甩上去")
    check(config)
    prepare_out_dir(config.out_dir)
    stop = stop_on_ctrl_c()
    plot_style()
    device = {"platform": jax.default_backend(), "count": jax.device_count()}
    if config.watch:
        return watch(play, PPOAgent(config), config)
    if config.compare:
        rows = compare(config, stop)
        table = comparison_table(rows)
        (config.out_dir / "comparison.md").write_text(table, encoding="utf-8")
        save_metrics(config, time.perf_counter() - PROCESS_START, device, comparison=rows)
        print(table)
        if "notes" in rows:  # 每一種至少跑完一個隨機種子
            draw_comparison(rows, config.out_dir)
        return finish(config, stop.is_set(), f"完成 {sum(len(row['curves']) for row in rows.values())} 次訓練")

    result = train(config, stop)
    eval_returns = evaluate(result.agent)
    eval_mean = float(eval_returns.mean())
    solved = eval_mean >= TARGET_RETURN
    draw_learning_curve(result, eval_mean, config)
    draw_clipped_objective(config)
    save_gif(play(result.agent, "rgb_array"), config.out_dir / "agent.gif")
    save_weights(result.agent, config.out_dir / "weights.npz")
    results = {"env_steps": result.env_steps, "eval_returns": eval_returns.tolist(), "eval_mean": eval_mean}
    results |= {"solved": solved, "curve": result.curve, "outside_shares": result.outside_shares}
    results |= {"memory_bytes": result.memory_bytes}
    save_metrics(config, result.seconds, device, **results)
    figure = f"{EVAL_EPISODES} 個評估回合的平均回報 {eval_mean:.1f}"
    print(f"{'達標' if solved else '未達標'}：{figure}（目標 {TARGET_RETURN:.1f}）")
    finish(config, result.interrupted, f"走了 {result.env_steps} 步")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except FloatingPointError as error:
        fail(f"{error}；把學習率調小再試", status=1)
