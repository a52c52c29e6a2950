"""第 4 課：GRPO，不要評論家，用一群答案互相比較 (模組七)。

問題：PPO 的評論家和演員一樣大。能不能不要它？拿 MNIST 當一步就結束的遊戲：看圖片，猜數字，猜對得 1 分。

    python 4_GRPO_MNIST/grpo_mnist.py                                  訓練 10 輪，每輪之後在測試集上評估
    python 4_GRPO_MNIST/grpo_mnist.py --group image --group-size 16    同一張圖片的 16 個答案互相比較
    python 4_GRPO_MNIST/grpo_mnist.py --algorithm ppo                  對照：PPO，有評論家
    python 4_GRPO_MNIST/grpo_mnist.py --compare                        各種做法各跑十個隨機種子，畫在一起

結果在 outputs/：learning_curve.png、mistakes.png、weights.npz、metrics.json。

出處：GRPO：Shao 等 (2024)，DeepSeekMath，arXiv 2402.03300，式 (3)、(4)。
比例裁剪：Schulman 等 (2017)，arXiv 1707.06347，式 (7)。MNIST：LeCun 等 (1998)。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import functools
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import grpo_mnist_extras as extras
import jax
import jax.numpy as jnp
import mnist
import numpy as np
import optax
from flax import nnx
from tensorflow_probability.substrates.jax import distributions as tfd
from tqdm import tqdm

from lesson_extras import refuse_changed, save_weights

DATA_DIR = Path(__file__).resolve().parent / "data" / "mnist_packed" / "1.0.0"
TRAIN_IMAGES = 60_000
STATE_DIM = 784  # 28 × 28 個像素
ACTION_DIM = 10  # 猜 0 到 9
HIDDEN_DIM = 128
TRAIN_TARGET = 97.34  # 最後一輪，訓練集上採樣的準確率 (%)：筆記寫的數字
TEST_TARGET = 97.2  # 最後一輪之後，測試集上貪婪的準確率 (%)

# 1. 超參數 -------------------------------------------------------------------------------------------

Algorithm = Literal["grpo", "ppo", "supervised"]
UNUSED = {  # 用不到哪些旗標；寫了就拒絕，不要讓人以為有作用
    "--algorithm ppo": ("group", "baseline"),  # 它的基線是評論家
    "--algorithm supervised": ("group", "baseline", "clip_epsilon", "beta"),
    "--compare": ("algorithm", "group", "baseline"),  # 它自己決定每一種做法
}


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    algorithm: Algorithm = "grpo"  # 演算法：ppo 用評論家當基線；supervised 直接給答案，拿來對照
    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    num_epochs: Annotated[int, (1, 1000)] = 10  # 訓練集看幾輪
    batch_size: Annotated[int, (2, TRAIN_IMAGES)] = 256  # 一個批次 (batch) 有幾張不同的圖片；不足一批的圖片這一輪不用
    group_size: Annotated[int, (1, 1024)] = 4  # 每張圖片採樣幾個答案 (G)
    group: Literal["batch", "image"] = "batch"  # 誰和誰比：batch 是整個批次的答案，image 是同一張圖片的 G 個答案
    baseline: Literal["group", "moving-average"] = "group"  # grpo 的基線：群組的平均，或以前各批平均的移動平均
    train_epochs: Annotated[int, (1, 64)] = 4  # 同一批答案學幾遍 (K)
    learning_rate: Annotated[float, (1e-6, 1)] = 2e-3  # Adam 的學習率；評論家用同一個
    anneal_learning_rate: bool = True  # 學習率照餘弦降到 0
    clip_epsilon: Annotated[float, (1e-6, 1)] = 0.2  # 比例裁剪的 ε：比例的界線是 1 - ε 與 1 + ε
    beta: Annotated[float, (0, 1e6)] = 0.0  # KL 散度懲罰的權重 β；參考模型是凍結的初始策略
    compare: bool = False  # 各種做法與批次大小，各跑十個隨機種子，畫在一起
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        chosen = "--compare" if self.compare else f"--algorithm {self.algorithm}"
        refuse_changed(self, chosen, UNUSED.get(chosen, ()))
        if self.group == "image" and self.group_size == 1:
            raise ValueError("--group image 的 --group-size 是 1；一個答案沒有對象可比，至少要 2")
        if self.group == "image" and self.baseline != "group":
            raise ValueError(f"--group image 配上 --baseline {self.baseline}；移動平均只能和 --group batch 一起用")
        if (answers := self.batch_size * self.group_size) > 2**20:
            raise ValueError(f"--batch-size × --group-size 是 {answers:,} 個答案；一批不能超過 {2**20:,} 個")
        if self.compare:
            extras.variants(self)  # 每一種做法的設定都先檢查過


# 2. 資料：MNIST 是一步就結束的遊戲 -------------------------------------------------------------------

# mnist.load 讀出 Data(train, test)，各是 Split(images, labels)：圖片 (N, 784) 與標籤 (N,)，都是 uint8


def calculate_rewards(actions: jax.Array, labels: jax.Array) -> jax.Array:
    """猜對 1，猜錯 0；動作 (G, B) 對上標籤 (B,)。"""
    return jnp.where(actions == labels, 1.0, 0.0)


# 3. 網路 ---------------------------------------------------------------------------------------------


# 變異數與 Flax 的預設 (lecun_normal) 相同；均勻分佈的程式編譯起來比較快
Linear = functools.partial(nnx.Linear, kernel_init=nnx.initializers.lecun_uniform())


class MLP(nnx.Module):
    """784-128-128-out_features，中間是 ReLU。"""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, HIDDEN_DIM, rngs=rngs)
        self.fc2 = Linear(HIDDEN_DIM, HIDDEN_DIM, rngs=rngs)
        self.fc_out = Linear(HIDDEN_DIM, out_features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc_out(x)


class Actor(MLP):
    """演員：圖片 (..., 784)，值在 0 到 1 → 猜哪個數字的分佈。"""

    def __call__(self, x: jax.Array) -> tfd.Categorical:
        return tfd.Categorical(logits=super().__call__(x))


class Critic(MLP):
    """評論家，和演員一樣大，只有 --algorithm ppo 才有：圖片 (..., 784) → 預期的獎勵 V(s) (...)。"""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x)[..., 0]


# 4. 記憶：只有一個批次，學完 K 遍就丟 ----------------------------------------------------------------


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


# 5. 智慧體 -------------------------------------------------------------------------------------------


def group_baseline(rewards: jax.Array, group: str) -> jax.Array:
    """群組的平均獎勵；rewards 是 (G, B)，回傳 (1, 1) 或 (1, B)。"""
    return rewards.mean(axis=0 if group == "image" else None, keepdims=True)


def relative_advantages(rewards: jax.Array, baseline: jax.Array, group: str) -> jax.Array:
    """相對優勢 (rewards - baseline) / 它的標準差，形狀 (G, B)；arXiv 2402.03300 第 4.1.2 節。

    標準差是 rewards - baseline 在群組裡的；群組共用一個基線時，它就是獎勵的標準差。ppo 的基線一張圖片一個，兩者不同。
    不再減一次平均：筆記的標準化會再減，整批共用一個數的基線 (例如移動平均) 會被它蓋掉。
    ppo 的也不再減，和第 3、6 課的 PPO 不同：減掉基線之後，平均不一定是 0。
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
    """KL(π_θ ‖ π_ref) 的估計，arXiv 2402.03300 式 (4)：動作採樣自 π_θ 時不偏，而且每一項都不是負的。"""
    difference = reference_log_probs - log_probs
    return jnp.exp(difference) - difference - 1


def make_optimizer(learning_rate: float, decay_steps: int | None):
    """Adam；學習率照餘弦，在 decay_steps 次更新之後降到 0，None 是不降。"""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, decay_steps) if decay_steps else learning_rate)


class GRPOAgent(nnx.Module):
    """演員與它的最佳化器；ppo 多一個評論家，β > 0 多一份凍結的參考模型。updates 是一共要更新幾次。"""

    def __init__(self, config: Config, updates: int, key: jax.Array):
        self.algorithm = config.algorithm
        self.group, self.group_size, self.baseline = config.group, config.group_size, config.baseline
        self.train_epochs, self.clip_epsilon, self.beta = config.train_epochs, config.clip_epsilon, config.beta
        self.rng_stream = nnx.Rngs(key)
        tx = make_optimizer(config.learning_rate, updates if config.anneal_learning_rate else None)
        self.actor = Actor(STATE_DIM, ACTION_DIM, rngs=self.rng_stream)
        self.actor_optimizer = nnx.Optimizer(self.actor, tx, wrt=nnx.Param)
        self.average_reward = nnx.Variable(jnp.zeros(()))  # 移動平均
        self.reference = nnx.clone(self.actor) if config.beta > 0 else None
        self.critic = Critic(STATE_DIM, 1, rngs=self.rng_stream) if config.algorithm == "ppo" else None
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
            objective, clip_fraction = self.actor_objective(actor, batch)
            return -objective, clip_fraction  # 負號：最佳化器只會往下走

        def critic_loss_fn(critic):
            return jnp.mean((critic(batch.states) - batch.rewards) ** 2)

        if self.critic:
            grads = nnx.grad(critic_loss_fn)(self.critic)
            self.critic_optimizer.update(self.critic, grads)
        (loss, clip_fraction), grads = nnx.value_and_grad(actor_loss_fn, has_aux=True)(self.actor)
        self.actor_optimizer.update(self.actor, grads)
        return loss, clip_fraction

    def learn(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """同一批學 K 遍；回傳每一遍的損失與越界的比率，各 (K,)。"""

        def one_pass(agent):
            return agent, agent.train_actor(batch)

        repeat = nnx.scan(one_pass, length=self.train_epochs, in_axes=nnx.Carry, out_axes=(nnx.Carry, 0))
        _, log = repeat(self)
        return log


# 網路與最佳化器的狀態編譯成一次呼叫；亂數的 key 是輸入，換隨機種子不必重新編譯
build_agent = nnx.jit(GRPOAgent, static_argnums=(0, 1))


def make_agent(config: Config, images: int) -> GRPOAgent:
    """未訓練的智慧體；images 是訓練集有幾張圖片，學習率照實際的更新次數下降。"""
    key = jax.random.key(config.seed, impl="rbg")  # rbg：採樣與編譯都比 JAX 預設的產生器快
    updates = config.num_epochs * (images // config.batch_size) * config.train_epochs
    return build_agent(replace(config, seed=0), updates, key)


# 6. 訓練 ---------------------------------------------------------------------------------------------


@nnx.jit
def train_epoch(agent: GRPOAgent, data: mnist.Split, order: jax.Array) -> dict[str, jax.Array]:
    """一整輪編譯成一次呼叫；order (批次數, B) 是圖片的編號。紀錄的第一維是批次。"""

    def train_batch(agent, indices):
        batch = agent.rollout(data.images[indices] / 255, data.labels[indices])
        loss, clip_fraction = agent.learn(batch)
        return agent, {
            "reward": batch.rewards.mean(),  # 也就是採樣的準確率
            "silent": jnp.mean(batch.advantages == 0),  # 優勢是 0 的答案的比率：它們不會推動任何東西
            "residual": jnp.mean((batch.rewards - batch.baseline) ** 2),  # 基線沒有解釋掉的部分
            "loss": loss,
            "clip_fraction": clip_fraction,
        }

    _, log = nnx.scan(train_batch, in_axes=(nnx.Carry, 0))(agent, order)
    return log


@dataclass
class Result:
    agent: GRPOAgent
    history: list[extras.Epoch]
    epoch_seconds: list[float]  # 每一輪訓練的秒數，不含評估；第一輪含編譯
    env_steps: int  # 一共採樣了幾個答案；一個答案就是一步的回合
    seconds: float
    interrupted: bool  # 被 Ctrl-C 提早結束


def train(config: Config, data: mnist.Data, stop: threading.Event | None = None, progress: bool = True) -> Result:
    """照 config 在 data 上訓練一個智慧體；stop 被設定時，做完目前這一輪就停。

    Raises:
        LessonError: 損失變成 NaN 或無限大。
        ValueError: 訓練集比一個批次還少。
    """
    start = time.perf_counter()
    rng, images = np.random.default_rng(config.seed), len(data.train.labels)
    if images < config.batch_size:
        raise ValueError(f"訓練集只有 {images} 張圖片；batch_size 要在這以下")
    agent = make_agent(config, images)
    used = images // config.batch_size * config.batch_size  # 不足一批的圖片這一輪不用
    history, epoch_seconds = [], []
    with tqdm(total=config.num_epochs, desc="訓練", unit="輪", disable=None if progress else True) as bar:
        for _ in range(config.num_epochs):
            if stop and stop.is_set():
                break
            epoch_start = time.perf_counter()
            order = rng.permutation(images)[:used].reshape(-1, config.batch_size)
            log = jax.device_get(train_epoch(agent, data.train, order))
            epoch_seconds.append(time.perf_counter() - epoch_start)
            finite = np.isfinite(log["loss"])
            if not finite.all():
                step = len(history) * finite.size + np.argmin(finite) + 1
                smaller = "學習率或 β " if config.beta else "學習率"
                raise lesson.LessonError(f"第 {step} 次更新的損失不是有限的數；把{smaller}調小再試", 1)

            history.append(extras.summarize(log, *evaluate(agent.actor, data.test)))
            reached = history[-1]
            bar.set_postfix_str(f"平均獎勵 {reached.train_accuracy / 100:.4f}，測試集 {reached.test_accuracy:.2f} %")
            bar.update()
    seconds, env_steps = time.perf_counter() - start, len(history) * used * config.group_size
    return Result(agent, history, epoch_seconds, env_steps, seconds, len(history) < config.num_epochs)


# 7. 評估 ---------------------------------------------------------------------------------------------


@nnx.jit
def predict(actor: Actor, images: jax.Array) -> jax.Array:
    """貪婪的答案：機率最大的數字，(N,)。"""
    return actor(images / 255).mode()


def evaluate(actor: Actor, data: mnist.Split) -> tuple[float, int]:
    """貪婪的準確率 (%)，以及十個數字裡一次都沒猜的有幾個。"""
    guesses = np.asarray(predict(actor, data.images))
    return float(100 * np.mean(guesses == np.asarray(data.labels))), ACTION_DIM - len(np.unique(guesses))


# 8. 主程式 -------------------------------------------------------------------------------------------


def main() -> None:
    config = lesson.parse(Config, "第 4 課：GRPO，不要評論家，用一群答案互相比較")
    lesson.find_devices()
    data = mnist.load(DATA_DIR)
    if config.compare:
        return extras.compare(RUN, config, train, data)
    result = train(config, data, RUN.stop)
    RUN.require_learnt(result.history)
    actor, last = result.agent.actor, result.history[-1]
    save_weights(config.out_dir / "weights.npz", actor)
    memory = extras.memory_bytes(result.agent)
    RUN.save_metrics(
        config, result.seconds, **extras.columns(result.history), parameters=extras.parameter_count(actor),
        env_steps=result.env_steps, memory_bytes=memory,
    )  # fmt: skip
    extras.draw_learning_curve(extras.columns(result.history), config, TRAIN_TARGET, TEST_TARGET)
    extras.draw_mistakes(np.asarray(predict(actor, data.test.images)), data.test, config.out_dir)
    for remark in extras.remarks(last, config):
        print(remark)
    reached = last.train_accuracy >= TRAIN_TARGET and last.test_accuracy >= TEST_TARGET
    figure = f"訓練集採樣 {last.train_accuracy:.2f} %、測試集貪婪 {last.test_accuracy:.2f} %"
    print(f"{'達標' if reached else '未達標'}：{figure}（目標 {TRAIN_TARGET} %、{TEST_TARGET} %）")
    RUN.finish(config, f"訓練了 {len(result.history)} 輪" if result.interrupted else "")


if __name__ == "__main__":
    RUN(main)
