"""第 6 課跑完之後看的東西：摘要、圖、印出來的答案、--compare，與少用的旗標要的零件。腳本把要用的函式傳進來。"""

import functools
import math
import time

import axis_rules
import jax
import jax.numpy as jnp
import numpy as np
import task
from flax import nnx

import lesson_extras

PASS_KS = (1, 2, 4, 8, 16, 32)
SHOWN_PROMPTS, SHOWN_ANSWERS = 3, 4


# 旗標 ------------------------------------------------------------------------------------------------


def axis_sizes(config) -> list[tuple[str, int]]:
    """每個邏輯軸會切到的大小；batch 有好幾種。"""
    batches = config.num_prompts, config.rows, task.TEST_PROMPTS
    batches += config.text_rows(config.pretrain_batch_size) + config.text_rows(task.TEST_PROMPTS)
    sizes = {"vocab": task.VOCAB, "embed": config.embed_dim, "mlp": config.mlp_dim, "heads": config.num_heads}
    sizes |= {"head_dim": config.embed_dim // config.num_heads, "position": task.PROMPT_LENGTH + task.ANSWER_LENGTH}
    if config.algorithm == "supervised":
        batches += config.text_rows(2 * config.rows)
    return [*sizes.items(), *(("batch", size) for size in batches)]


def check_experiments(config) -> None:
    """--measure 與 --compare 自己決定的旗標，不能另外給。"""


def load_base(config, model_class):
    """--base 的權重，照規則手冊放好。"""

    model = nnx.jit(lambda: model_class(config, nnx.Rngs(0)))()
    lesson_extras.load_weights(config.base, model, "--base")
    axis_rules.place(model)
    return model


# 動態採樣 --------------------------------------------------------------------------------------------


def silent_groups(batch, groups: int) -> jax.Array:
    """哪幾題沒有訊號：每個答案的優勢都是 0；形狀 (groups,)。"""
    return jnp.all(batch.advantages.reshape(groups, -1) == 0, axis=1)


@functools.partial(jax.jit, static_argnames="groups")
def keep_live(batch, more, groups: int):
    """動態採樣：兩批裡先留有訊號的題目，湊滿 groups 題；都有訊號時，先來的先留。"""
    both = jax.tree.map(lambda *pair: jnp.concatenate(pair), batch, more)
    order = jnp.argsort(silent_groups(both, 2 * groups), stable=True)[:groups]
    return jax.tree.map(lambda x, old: x.reshape(2 * groups, -1)[order].reshape(old.shape), both, batch)


def supervised_log(losses: jax.Array, texts) -> dict:
    """--algorithm supervised 的紀錄：沒有採樣，獎勵與長度都是文字自己的。"""
    masks = [np.asarray(task.answer_mask(part[..., task.PROMPT_LENGTH :])) for part in texts]
    rows, tokens = sum(mask[..., 0].size for mask in masks), float(sum(mask.sum() for mask in masks))
    log = {"reward": 1.0, "length": tokens / rows, "step_by_step": masks[1][..., 0].size / rows, "silent": 0.0}
    return log | {"loss": float(losses.mean()), "outside": 0.0, "tokens": tokens}


# 摘要 ------------------------------------------------------------------------------------------------


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """k 個答案裡至少一個對的機率，無偏的估計：1 - C(n - c, k) / C(n, k)；correct (題, n)。Chen 等 (2021)。"""
    n = correct.shape[1]
    missed = [math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]
    return float(1 - np.mean(missed))


def percent(values: np.ndarray) -> float | None:
    return 100 * float(np.mean(values)) if len(values) else None


def summarize(prompts: np.ndarray, answers: list[np.ndarray], greedy: np.ndarray, sampled: np.ndarray) -> dict:
    """測試題的數字：answers[0] 是貪婪的，其餘是採樣的；greedy (題,) 與 sampled (題, n) 是對錯。"""
    written, right = np.concatenate(answers[1:]), sampled.reshape(-1)
    mask = np.asarray(task.answer_mask(written))
    stepwise = ((written == task.COMMA) & (mask > 0)).any(axis=1)
    shown = written.reshape(*sampled.shape, -1)[:SHOWN_PROMPTS, :SHOWN_ANSWERS]
    return {
        "greedy": percent(greedy),
        "sampled": percent(right),
        "length": float(mask.sum(axis=1).mean()),
        "step_by_step": percent(stepwise),
        "right_direct": percent(right[~stepwise]),
        "right_step_by_step": percent(right[stepwise]),
        "unfinished": percent(~(written == task.STOP).any(axis=1)),
        "pass_at_k": {k: 100 * pass_at_k(sampled, k) for k in PASS_KS},
        "examples": {
            task.decode(prompt): [[task.decode(answer), bool(ok)] for answer, ok in zip(rows, marks, strict=False)]
            for prompt, rows, marks in zip(prompts, shown, sampled, strict=False)
        },
    }


def array_bytes(tree) -> int:
    """所有陣列一共幾個位元組；純量 (例如最佳化器數步數的那一個) 不算。"""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim)


def memory_bytes(agent) -> dict[str, int]:
    """訓練時要記住的東西，整個模型各佔幾個位元組；梯度和參數一樣多。"""

    models = [model for model in (agent.actor, agent.critic) if model]
    optimizers = [optimizer for optimizer in (agent.actor_optimizer, agent.critic_optimizer) if optimizer]
    parameters = array_bytes([nnx.state(model, nnx.Param) for model in models])
    reference = array_bytes(nnx.state(agent.reference, nnx.Param)) if agent.reference else 0
    moments = array_bytes([nnx.state(optimizer) for optimizer in optimizers])
    return {"parameters": parameters, "gradients": parameters, "moments": moments, "reference": reference}


def save(run, config, result, base: dict, trained: dict) -> bool:
    """權重與數字；回傳這是不是第 0 個行程，檔案與畫面只交給它。"""
    whole = [axis_rules.gather(model) for model in (result.base, result.agent.actor)]
    if jax.process_index() > 0:
        return False
    for name, model in zip(("base", "weights"), whole, strict=True):
        lesson_extras.save_weights(config.out_dir / f"{name}.npz", model)
    train_seconds = sum(result.seconds.values())
    run.save_metrics(
        config, train_seconds, greedy=trained["greedy"], sampled=trained["sampled"], base_sampled=base["sampled"],
        base=base, trained=trained, curve=result.curve, pretrain_losses=result.pretrain_losses, updates=result.updates,
        env_steps=int(sum(result.curve["tokens"])), memory_bytes=memory_bytes(result.agent),
        parameters=sum(x.size for x in jax.tree.leaves(nnx.state(result.base, nnx.Param))),
        seconds={"train": train_seconds, "total": time.perf_counter() - run.started} | result.seconds,
    )  # fmt: skip
    return True


def draw(result, config, base, trained):
    pass


def describe(base, trained):
    keys = ("greedy", "sampled", "length", "step_by_step", "right_direct", "right_step_by_step", "language_model_loss")
    return "\n".join(f"{k} {base[k]} {trained[k]}" for k in keys)
