"""第 6 課：GRPO 訓練語言模型，一個詞元一個詞元地寫，切在 Mesh 上 (模組六、七)。

問題：動作從一個變成幾十個，獎勵卻只在寫完之後有一個。一群答案互相比較還夠嗎？學到的是新本事，還是把舊本事磨利？

    python 6_GRPO_LLM/grpo_llm.py                             預訓練一個會加法的小模型，再用 GRPO 訓練
    python 6_GRPO_LLM/grpo_llm.py --base 6_GRPO_LLM/outputs/base.npz --beta 0.3    從同一個基礎模型再做一個實驗
    python 6_GRPO_LLM/grpo_llm.py --reward last-digit         有漏洞的獎勵：只檢查個位數
    python 6_GRPO_LLM/grpo_llm.py --measure mesh              五種切法：位元組、通訊、秒數
    python 6_GRPO_LLM/grpo_llm.py --compare                   各種做法各跑十個隨機種子，畫在一起

結果在 outputs/：learning_curve.png、pass_at_k.png、base.npz (基礎模型)、weights.npz、metrics.json。

出處：GRPO：Shao 等 (2024)，DeepSeekMath，arXiv 2402.03300，式 (3)、(4)。規則當獎勵：DeepSeek-R1，arXiv 2501.12948。
平均的方法與動態採樣：DAPO，arXiv 2503.14476；Dr. GRPO，arXiv 2503.20783。比例裁剪：arXiv 1707.06347，式 (7)。
"""

import lesson

RUN = lesson.Run(__name__, __file__)  # 從這裡開始計時，Ctrl-C 也從這裡開始有人接

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import axis_rules
import critic
import grpo_llm_extras as extras
import jax
import jax.numpy as jnp
import numpy as np
import task
from axis_rules import constrain, distribute, replicate
from flax import nnx
from hosts import check_processes
from model import Transformer, answer_log_probs, answer_outputs
from pretraining import check_finite, make_keys, make_optimizer, pretrain, pretrain_steps, text_loss
from task import ANSWER_LENGTH, PROMPT_LENGTH, Problems
from tqdm import tqdm

GREEDY_TARGET, SAMPLED_TARGET = 95.0, 88.0  # 訓練之後，測試題的正確率 (%)
SAMPLING_ROUNDS = 4  # --dynamic-sampling 最多採樣幾次
PASS_PROMPTS, PASS_SAMPLES = 128, 32  # pass@k：幾題，一題幾個答案

# 1. 超參數 -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """超參數的唯一來源：命令列、README 的表格與測試都讀這裡。"""

    algorithm: Literal["grpo", "ppo", "supervised"] = "grpo"  # 演算法；ppo 有評論家，supervised 只是接著預訓練
    seed: Annotated[int, (0, 2**32 - 1)] = 42  # 隨機種子 (seed)
    num_layers: Annotated[int, (1, 32)] = 2  # Transformer 的層數
    embed_dim: Annotated[int, (2, 4096)] = 96  # 殘差流的寬度 (embed 軸)
    mlp_dim: Annotated[int, (1, 16_384)] = 384  # MLP 中間的寬度 (mlp 軸)
    num_heads: Annotated[int, (1, 64)] = 4  # 注意力頭的個數 (heads 軸)
    base: Path | None = None  # 從這個 base.npz 開始，不預訓練
    pretrain_steps: Annotated[int, (1, 10**6)] = 1_000  # 預訓練幾步
    pretrain_batch_size: Annotated[int, (1, 4096)] = 64  # 預訓練一步用幾段文字
    step_by_step_share: Annotated[float, (0, 1)] = 0.375  # 預訓練的文字裡，逐步作答佔幾分之幾
    pretrain_learning_rate: Annotated[float, (1e-8, 1)] = 3e-3  # 預訓練的學習率：暖身，再照餘弦降到 0
    num_prompts: Annotated[int, (1, 4096)] = 32  # 一批有幾個不同的提示
    group_size: Annotated[int, (1, 1024)] = 8  # 每個提示採樣幾個答案 (G)
    updates: Annotated[int, (1, 10**6)] = 36  # 收集與學習幾個階段；一個階段更新 train_epochs 次
    train_epochs: Annotated[int, (1, 1000)] = 1  # 同一批答案學幾遍 (K)
    learning_rate: Annotated[float, (1e-8, 1)] = 3e-4  # Adam 的學習率
    anneal_learning_rate: bool = False  # 學習率照餘弦降到 0
    critic_learning_rate: Annotated[float, (1e-8, 1)] = 1e-3  # ppo 的評論家用的學習率
    gae_lambda: Annotated[float, (0, 1)] = 1.0  # ppo 的 GAE 的 λ；γ 固定是 1
    clip_epsilon: Annotated[float, (1e-6, 1)] = 0.2  # 比例裁剪的 ε：界線是 1 - ε 與 1 + ε
    beta: Annotated[float, (0, 1e6)] = 0.0  # KL 散度懲罰的權重 β；參考模型是凍結的基礎模型
    loss_average: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # 詞元的平均：先在答案裡；全部一起；除以固定長度
    reward: Literal["exact", "last-digit"] = "exact"  # 獎勵的規則：整個和都對，或只看個位數 (有漏洞)
    dynamic_sampling: bool = False  # 全對與全錯的題目換掉，重新採樣
    mesh: str = "auto"  # Mesh 的形狀：data 軸 x model 軸；auto 在 CPU 上是兩個假裝置 2x1，別處全放 data 軸
    rules: str = "batch=data,heads=model,mlp=model"  # 規則手冊：邏輯軸=Mesh 軸；兩個軸合起來寫 data+model
    coordinator: str = ""  # 多台主機：第 0 個行程的 HOST:PORT；auto 表示由 TPU 或 Slurm 的環境決定
    num_processes: Annotated[int, (1, 64)] = 1  # 多台主機：總共幾個行程
    process_id: Annotated[int, (0, 63)] = 0  # 多台主機：這是第幾個行程，從 0 開始
    measure: Literal["none", "mesh", "cost", "ledger"] = "none"  # 不訓練，改量切法、採樣的成本，或算 80 億參數的帳
    compare: bool = False  # 各種做法各跑十個隨機種子，畫在一起
    out_dir: Path = Path(__file__).resolve().parent / "outputs"  # 結果放在哪裡

    def __post_init__(self):
        lesson.check_bounds(self)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"--embed-dim 是 {self.embed_dim}；每個頭分到一樣寬，要是 {self.num_heads} 的倍數")
        if self.rows > 2**15:
            raise ValueError(f"一批有 {self.rows:,} 個答案；--num-prompts × --group-size 不能超過 32,768")
        if self.algorithm == "grpo" and self.group_size == 1:
            raise ValueError("--group-size 是 1；一個答案沒有對象可比，至少要 2")
        if self.algorithm != "grpo" and (self.dynamic_sampling or self.loss_average == "dr_grpo"):
            raise ValueError(f"--algorithm {self.algorithm} 沒有群組；--dynamic-sampling 與 dr_grpo 只給 grpo 用")
        check_processes(self)
        mesh = axis_rules.parse_mesh("2x1" if self.mesh == "auto" else self.mesh)
        axis_rules.check_rules(axis_rules.parse_rules(self.rules), mesh, extras.axis_sizes(self))
        extras.check_experiments(self)

    @property
    def rows(self) -> int:
        """一批有幾個答案。"""
        return self.num_prompts * self.group_size

    def text_rows(self, total: int) -> tuple[int, int]:
        """total 段預訓練的文字裡，直接作答與逐步作答各幾段；逐步作答湊成 8 的倍數，八個裝置才分得平均。"""
        step_by_step = min(total, 8 * round(self.step_by_step_share * total / 8))
        return total - step_by_step, step_by_step


# 2. 環境：提示是狀態，下一個詞元是動作，寫完才有獎勵 (task.py) ----------------------------------------


# 3. 網路：只有解碼器的 Transformer (model.py)；先預訓練成基礎模型 (pretraining.py) --------------------


# 4. 優勢與目標 ---------------------------------------------------------------------------------------


def relative_advantages(rewards: jax.Array, divide: bool = True) -> jax.Array:
    """同一題的答案互相比：(獎勵 - 群組的平均) / 群組的標準差，形狀 (P, G)；arXiv 2402.03300 第 4.1.2 節。

    整組全對或全錯，沒有誰比誰好，優勢是 0。divide=False 不除標準差 (Dr. GRPO)。
    """
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    same = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    spread = rewards.std(axis=1, keepdims=True) if divide else jnp.ones_like(advantages)
    return jnp.where(same, 0.0, advantages / jnp.where(same, 1.0, spread))


def clipped_objective(ratio, advantage, clip_epsilon):
    """PPO-Clip 的目標，arXiv 1707.06347 式 (7)；每個詞元各有一個比例，各自裁剪。"""
    clipped_ratio = jnp.clip(ratio, 1 - clip_epsilon, 1 + clip_epsilon)
    return jnp.minimum(ratio * advantage, clipped_ratio * advantage)


def kl_estimate(log_probs, reference_log_probs):
    """KL(π_θ ‖ π_ref) 的估計，arXiv 2402.03300 式 (4)；每個詞元一個。"""
    difference = reference_log_probs - log_probs
    return jnp.exp(difference) - difference - 1


def average(values: jax.Array, mask: jax.Array, kind: str) -> jax.Array:
    """(N, 長度) 的詞元 → 一個數；mask 是 0 的不算。

    grpo：先在每個答案裡平均，再對答案平均。dapo：所有詞元一起平均。dr_grpo：每個答案都除以同一個長度。
    """
    if kind == "grpo":
        return jnp.mean(jnp.sum(values * mask, axis=1) / jnp.sum(mask, axis=1))
    return jnp.sum(values * mask) / (jnp.sum(mask) if kind == "dapo" else mask.size)


# 5. 智慧體：寫答案，然後學習 -------------------------------------------------------------------------


class Batch(NamedTuple):
    """一批答案：P 個提示，各 G 個；同一個提示的答案相鄰。長度都補到 ANSWER_LENGTH。"""

    tokens: jax.Array  # (P × G, 提示 + 答案)
    mask: jax.Array  # (P × G, 答案)，句點之後是 0
    log_probs: jax.Array  # (P × G, 答案)，採樣當時的 log π_old
    reference_log_probs: jax.Array  # (P × G, 答案)；β = 0 時沒有用到
    rewards: jax.Array  # (P × G,)
    advantages: jax.Array  # (P × G, 答案)：grpo 的每個詞元都一樣
    returns: jax.Array  # (P × G, 答案)：ppo 的評論家的目標


def sample(actor: Transformer, prompts: jax.Array, key: jax.Array, group_size: int, greedy: bool | jax.Array = False):
    """每個提示寫 group_size 個答案，一次一個詞元；回傳詞元與它們的 log π，都是 (P × G, ANSWER_LENGTH)。"""
    decoder = nnx.clone(actor)
    decoder.init_cache(len(prompts))
    graphdef, cache, weights = nnx.split(decoder, nnx.Cache, ...)

    def read(cache, position, token):
        """讀一個詞元，記進 KV 快取；回傳快取與下一個詞元的 logits。"""
        decoder = nnx.merge(graphdef, cache, weights)
        logits = decoder(token[:, None], position, decode=True)[:, 0]
        cache = jax.tree.map(lambda x: constrain(x, "cache") if x.ndim == 4 else x, nnx.state(decoder, nnx.Cache))
        return cache, logits

    def write(carry, step):
        cache, logits, ended = carry
        position, key = step
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.where(greedy, jnp.argmax(logits, axis=-1), jax.random.categorical(key, logits))
        token = jnp.where(ended, task.PAD, chosen)
        cache, logits = read(cache, position, token)
        log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=1)[:, 0]
        return (cache, logits, ended | (token == task.STOP)), (token, log_prob)

    # 提示只讀一次，G 個答案共用；之後每個答案各寫各的
    positions = jnp.arange(PROMPT_LENGTH + ANSWER_LENGTH)
    cache, logits = jax.lax.scan(lambda cache, step: read(cache, *step), cache, (positions[:PROMPT_LENGTH], prompts.T))
    cache, logits = jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0) if x.ndim else x, (cache, logits[-1]))
    steps = positions[PROMPT_LENGTH:], jax.random.split(key, ANSWER_LENGTH)
    _, (answers, log_probs) = jax.lax.scan(write, (cache, logits, jnp.zeros(len(logits), bool)), steps)
    return answers.T, log_probs.T


class GRPOAgent(nnx.Module):
    """演員與它的最佳化器；β > 0 多一個凍結的參考模型，ppo 多一個評論家。"""

    def __init__(self, config: Config, base: Transformer, critic_key: jax.Array):
        self.algorithm, self.group_size, self.gae_lambda = config.algorithm, config.group_size, config.gae_lambda
        self.loss_average, self.reward = config.loss_average, config.reward
        self.clip_epsilon, self.beta = config.clip_epsilon, config.beta
        self.actor = nnx.clone(base)
        steps = config.updates * config.train_epochs if config.anneal_learning_rate else None
        tx = make_optimizer(config.learning_rate, steps)
        self.actor_optimizer = nnx.Optimizer(self.actor, tx, wrt=nnx.Param)
        self.reference = nnx.clone(base) if config.beta > 0 else None
        self.critic = critic.make_critic(config, base, critic_key) if config.algorithm == "ppo" else None
        tx = make_optimizer(config.critic_learning_rate, steps)
        self.critic_optimizer = nnx.Optimizer(self.critic, tx, wrt=nnx.Param) if self.critic else None

    def rollout(self, prompts: jax.Array, sums: jax.Array, key: jax.Array) -> Batch:
        """收集：採樣、給分、算優勢。"""
        answers, log_probs = sample(self.actor, prompts, key, self.group_size)
        tokens = jnp.concatenate([jnp.repeat(prompts, self.group_size, axis=0), answers], axis=1)
        mask = task.answer_mask(answers)
        rewards = task.calculate_rewards(answers, jnp.repeat(sums, self.group_size), self.reward)
        reference = answer_log_probs(self.reference, tokens) if self.reference else log_probs
        if self.critic:
            values = answer_outputs(self.critic, tokens)[..., 0]
            advantages, returns = critic.token_advantages(rewards, values, mask, self.gae_lambda)
        else:
            grouped = relative_advantages(rewards.reshape(-1, self.group_size), self.loss_average != "dr_grpo")
            advantages = returns = jnp.broadcast_to(grouped.reshape(-1, 1), mask.shape)
        return Batch(tokens, mask, log_probs, reference, rewards, advantages, returns)

    def actor_objective(self, actor: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """要最大化的目標，arXiv 2402.03300 式 (3)；以及比例越界的詞元有多少。句點之後的比例當作 1，才不會溢位。"""
        log_probs = jnp.where(batch.mask > 0, answer_log_probs(actor, batch.tokens), batch.log_probs)
        ratio = jnp.exp(log_probs - batch.log_probs)
        objective = clipped_objective(ratio, batch.advantages, self.clip_epsilon)
        if self.beta > 0:
            reference = jnp.where(batch.mask > 0, batch.reference_log_probs, log_probs)
            objective -= self.beta * kl_estimate(log_probs, reference)
        clipped = (jnp.abs(ratio - 1) > self.clip_epsilon).astype(jnp.float32)
        return average(objective, batch.mask, self.loss_average), average(clipped, batch.mask, "dapo")

    def train_actor(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """更新一次；回傳損失，以及更新之前比例越界的比率。"""

        def actor_loss_fn(actor):
            objective, clip_fraction = self.actor_objective(actor, batch)
            return -objective, clip_fraction  # 負號：最佳化器只會往下走

        def critic_loss_fn(critic):
            error = answer_outputs(critic, batch.tokens)[..., 0] - batch.returns
            return average(error**2, batch.mask, "dapo")

        if self.critic:
            self.critic_optimizer.update(self.critic, nnx.grad(critic_loss_fn)(self.critic))
        (loss, clip_fraction), grads = nnx.value_and_grad(actor_loss_fn, has_aux=True)(self.actor)
        self.actor_optimizer.update(self.actor, grads)
        return loss, clip_fraction


build_agent = nnx.jit(GRPOAgent, static_argnums=0)  # 種子不同、其餘相同的 config 共用：--compare 一種設定只編譯一次


# 6. 訓練：預訓練，然後一批一批地收集與學習 -----------------------------------------------------------


@dataclass
class Result:
    base: Transformer  # 基礎模型
    agent: GRPOAgent
    pretrain_losses: list[float]  # 每一步
    curve: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # 每個階段一個數字
    seconds: dict[str, float] = field(default_factory=dict)  # 預訓練、收集、學習
    updates: int = 0
    interrupted: bool = False  # 被 Ctrl-C 提早結束


@nnx.jit
def collect(agent: GRPOAgent, prompts: jax.Array, sums: jax.Array, key: jax.Array) -> tuple[Batch, dict]:
    """收集編譯成一次呼叫：採樣、給分、算優勢；附上這一批的紀錄。"""
    batch = agent.rollout(prompts, sums, key)
    stepwise = jnp.any(batch.tokens[:, PROMPT_LENGTH:] == task.COMMA, axis=1)
    silent = extras.silent_groups(batch, len(prompts))
    log = {"reward": batch.rewards, "length": batch.mask.sum(axis=1), "step_by_step": stepwise, "silent": silent}
    means = {name: jnp.mean(values, dtype=jnp.float32) for name, values in log.items()}
    return batch, means | {"tokens": batch.mask.sum()}


@nnx.jit(static_argnames="train_epochs")
def learn(agent: GRPOAgent, batch: Batch, train_epochs: int) -> dict:
    """一個學習階段編譯成一次呼叫：同一批學 K 遍，然後丟棄。"""

    def one_pass(agent):
        return agent, agent.train_actor(batch)

    losses, clipped = nnx.scan(one_pass, length=train_epochs, in_axes=nnx.Carry, out_axes=(nnx.Carry, 0))(agent)[1]
    return {"loss": losses.mean(), "clip_fraction": clipped[-1]}


def one_update(agent: GRPOAgent, problems: Problems, config: Config, key: jax.Array, seconds: dict) -> dict:
    """收集一批、學習、丟棄；回傳這個階段的紀錄。"""
    start = time.perf_counter()
    if config.algorithm == "supervised":
        texts = problems.texts(config.train_epochs, *config.text_rows(extras.SUPERVISED_TEXTS * config.rows))
        log = extras.supervised_log(pretrain_steps(agent.actor, agent.actor_optimizer, texts), texts)
        seconds["learn"] += time.perf_counter() - start
        return log
    batch, log = collect(agent, *problems.prompts(config.num_prompts), key)
    for i in range(1, SAMPLING_ROUNDS if config.dynamic_sampling else 1):
        if not extras.silent_groups(batch, config.num_prompts).any():
            break
        another_key = jax.random.fold_in(key, ANSWER_LENGTH + i)  # 前 ANSWER_LENGTH 支給了第一次採樣的詞元
        more, more_log = collect(agent, *problems.prompts(config.num_prompts), another_key)
        batch = extras.keep_live(batch, more, config.num_prompts)
        log["tokens"] += more_log["tokens"]  # 換掉的也採樣了
    log = {name: float(value) for name, value in log.items()}  # 數字讀得到，採樣才真的做完了
    collected = time.perf_counter()
    log |= {name: float(value) for name, value in learn(agent, batch, config.train_epochs).items()}
    seconds["sample"] += collected - start
    seconds["learn"] += time.perf_counter() - collected
    return log


def train(config: Config, stop: threading.Event | None = None, progress: bool = True, base=None) -> Result:
    """預訓練 (給了 base 就不用)，再照 config 訓練；stop 被設定時停在兩個階段之間。損失變成 NaN 就丟出 LessonError。"""
    with extras.on_mesh(config):
        start = time.perf_counter()
        if config.base:
            base = extras.load_base(config)
        base, losses = (base, []) if base else pretrain(config, stop, progress)
        _, critic_key, sample_key = make_keys(config.seed)
        agent = build_agent(replace(config, seed=0), base, critic_key)
        seconds = {"pretrain": time.perf_counter() - start, "sample": 0.0, "learn": 0.0}
        result, problems = Result(base, agent, losses, seconds=seconds), Problems([config.seed, 1])
        with tqdm(total=config.updates, desc="訓練", unit="次", disable=None if progress else True) as bar:
            while result.updates < config.updates and not (stop and stop.is_set()):
                key = jax.random.fold_in(sample_key, result.updates)
                log = one_update(agent, problems, config, key, seconds)
                check_finite(np.array([log["loss"]]), result.updates, "訓練")
                for name, value in log.items():
                    result.curve[name].append(value)
                result.updates += 1
                bar.set_postfix_str(f"平均獎勵 {log['reward']:.3f}，長度 {log['length']:.1f}")
                bar.update()
    result.interrupted = result.updates < config.updates
    return result


# 7. 評估 ---------------------------------------------------------------------------------------------


@nnx.jit
def write_answers(actor: Transformer, prompts: jax.Array, key: jax.Array, greedy: jax.Array) -> jax.Array:
    return replicate(sample(actor, prompts, key, 1, greedy)[0])


def evaluate(actor: Transformer, config: Config) -> dict:
    """固定的測試題：貪婪的一個答案、採樣的許多答案，以及預訓練的文字上的損失；亂數與隨機種子無關。"""
    problems, correct, written = Problems(0), [], []
    prompts, sums = task.make_prompts(problems.test)
    with extras.on_mesh(config):
        many = np.repeat(np.arange(PASS_PROMPTS), PASS_SAMPLES).reshape(-1, len(prompts))
        for i, chosen in enumerate([np.arange(len(prompts)), *many]):  # 第一批是貪婪的
            key, rows = jax.random.key(i, impl="rbg"), distribute(prompts[chosen], "batch", None)
            written.append(np.asarray(write_answers(actor, rows, key, i == 0)))
            correct.append(np.asarray(task.calculate_rewards(written[i], sums[chosen], "exact")))
        loss = text_loss(actor, problems.test_texts(*config.text_rows(len(prompts))))
    sampled = np.concatenate(correct[1:]).reshape(PASS_PROMPTS, PASS_SAMPLES)
    return extras.summarize(prompts, np.concatenate(written[1:]), correct[0], sampled, float(loss))


# 8. 主程式 -------------------------------------------------------------------------------------------


def main() -> None:
    config = lesson.parse(Config, "第 6 課：GRPO 訓練語言模型，一個詞元一個詞元地寫，切在 Mesh 上")
    axis_rules.start_devices(config)
    lesson.find_devices()
    if config.measure != "none":
        return extras.measure(RUN, config, build_agent, collect, learn, sample)
    if config.compare:
        return extras.compare(RUN, config, train, evaluate)
    result = train(config, RUN.stop)
    RUN.require_learnt(result.updates)
    base, trained = evaluate(result.base, config), evaluate(result.agent.actor, config)
    whole = [axis_rules.gather(model) for model in (result.base, result.agent.actor)]  # 每個行程都要一起做
    if jax.process_index() > 0:
        return  # 檔案與畫面交給第 0 個行程
    extras.save(RUN, config, result, whole, base, trained)
    extras.draw(result, config, base, trained)
    print(extras.describe(base, trained, result.curve))
    reached = trained["greedy"] >= GREEDY_TARGET and trained["sampled"] >= SAMPLED_TARGET
    figures = f"測試題貪婪 {trained['greedy']:.1f} %、採樣 {trained['sampled']:.1f} %"
    print(f"{'達標' if reached else '未達標'}：{figures}（目標 {GREEDY_TARGET} %、{SAMPLED_TARGET} %）")
    RUN.finish(config, f"學了 {result.updates} 批" if result.interrupted else "")


if __name__ == "__main__":
    RUN(main)
