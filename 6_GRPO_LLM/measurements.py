"""第 6 課的 --measure：五種切法 (mesh)、G 與 KV 快取的成本 (cost)、80 億參數的帳 (ledger)。

量的是時間與位元組，和模型學到多少無關，所以用沒有訓練過的模型。要用的函式由腳本傳進來。
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import axis_rules
import jax
import jax.numpy as jnp
import numpy as np
import task
from collectives import read_collectives
from flax import nnx
from model import Transformer, answer_outputs

from lesson_extras import figure, markdown_table, refuse_changed, save

STRATEGIES = {  # 名字 → Mesh 與規則手冊
    "single": ("1x1", ""),
    "data": ("8x1", "batch=data"),
    "model": ("1x4", "heads=model,mlp=model,vocab=model"),
    "data_model": ("4x2", "batch=data,heads=model,mlp=model"),
    "fsdp": ("4x2", "batch=data,embed=data,heads=model,mlp=model"),
}
KINDS = ("policy", "gradients", "moments", "reference", "cache")
REPEATS = 3  # 每一種量幾次，取中位數；另外先跑一次，讓它編譯
GROUP_SIZES = (2, 4, 8, 16)
ANSWERS = 256  # 「答案一樣多」是幾個
LLAMA3_8B = {"parameters": 8_030_261_248, "layers": 32, "kv_heads": 8, "head_dim": 128}  # Grattafiori 等 (2024) 表 3
LLAMA3_8B |= {"vocab": 128_256, "embed": 4_096, "mlp": 14_336, "heads": 32}
ANSWER_LENGTHS = (1_024, 8_192, 32_768)


class Story(NamedTuple):
    """腳本裡要用的函式。"""

    on_mesh: Callable
    build_agent: Callable
    collect: Callable
    learn: Callable
    sample: Callable


class Measurement(NamedTuple):
    """--measure 的一種。"""

    key: str  # metrics.json 裡的名字
    function: Callable
    table: Callable
    rows: int  # 量完有幾列


def check(config) -> None:
    """用不到的、自己決定的旗標，不能另外給；要跑的切法，讓 Config 先檢查一遍。"""
    ignored = {
        "mesh": ("mesh", "rules", "coordinator", "base", "algorithm", "dynamic_sampling"),
        "cost": ("mesh", "num_prompts", "group_size", "coordinator", "base", "algorithm", "dynamic_sampling"),
        "ledger": [name for name in vars(config) if name not in ("measure", "group_size", "out_dir")],
    }
    refuse_changed(config, f"--measure {config.measure}", ignored[config.measure])
    if config.measure == "mesh":
        strategies(config)


def strategies(config) -> dict:
    """--measure mesh 要跑的設定。"""
    config = replace(config, measure="none", beta=config.beta or 0.1)
    return {name: replace(config, mesh=mesh, rules=rules) for name, (mesh, rules) in STRATEGIES.items()}


def measure(run, config, story: Story) -> None:
    """量一項，存檔，印出表格。"""
    kind = MEASUREMENTS[config.measure]
    rows = kind.function(config, story, run.stop)
    run.require_learnt(rows)
    undone = f"量了 {len(rows)} 列" if len(rows) < kind.rows else ""
    table = kind.table(rows)
    run.save_metrics(config, time.perf_counter() - run.started, **{kind.key: rows})
    save(config.out_dir / f"{config.measure}.md", table.encode())
    if config.measure == "mesh" and not undone:
        draw_strategies(rows, config.out_dir)
    print(table)
    print(verdict(config.measure, rows))
    run.finish(config, undone)


def verdict(kind: str, rows) -> str:
    if kind == "mesh":
        same = all(row["same_tokens"] == 1 for row in rows.values())
        figures = "、".join(f"{name} {100 * row['same_tokens']:.2f} %" for name, row in rows.items())
        return f"{'達標' if same else '未達標'}：與 single 相同的詞元 {figures}（目標 100 %）"
    if kind == "cost":
        same = min(row["same_tokens"] for row in rows)
        return f"{'達標' if same == 1 else '未達標'}：有沒有 KV 快取，相同的詞元 {100 * same:.2f} %（目標 100 %）"
    counted, published = count_parameters(LLAMA3_8B), LLAMA3_8B["parameters"]
    return f"{'達標' if counted == published else '未達標'}：照公布的形狀算出 {counted:,} 個參數（目標 {published:,}）"


def make_agent(config, story: Story):
    key = jax.random.key(config.seed, impl="rbg")
    base = nnx.jit(lambda key: Transformer(config, nnx.Rngs(key)))(key)
    return story.build_agent(config, base, key)  # 這支 key 是給評論家的；grpo 沒有，用不到


def seconds_of(function: Callable, *arguments) -> float:
    """跑 REPEATS 次的中位數，編譯不算。"""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


# 切法 ------------------------------------------------------------------------------------------------


def device_bytes(tree) -> int:
    """第一個裝置上實際放了多少位元組：量陣列的切片，不是算出來的。"""
    device = jax.local_devices()[0]
    shards = [shard for array in jax.tree.leaves(tree) if array.ndim for shard in array.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def make_cache(actor, rows: int):
    decoder = nnx.clone(actor)
    decoder.init_cache(rows)
    return jax.tree.map(lambda x: axis_rules.constrain(x, "cache") if x.ndim == 4 else x, nnx.state(decoder, nnx.Cache))


def count_collectives(compiled, mesh) -> dict[str, list[int]]:
    """編譯好的程式裡的集體通訊：名字 (軸) → [次數, 位元組]；迴圈裡的只數一次，實際上一個詞元一次。"""
    counts = {}
    for collective in read_collectives(compiled.as_text(), mesh):
        total = counts.setdefault(f"{collective.operation} ({'+'.join(collective.axes)})", [0, 0])
        total[0] += 1
        total[1] += collective.bytes
    return counts


def measure_mesh(config, story: Story, stop) -> dict:
    """每種切法：一個裝置的位元組、收集與學習各有哪些集體通訊、秒數，寫出來的詞元和 single 一不一樣。"""
    rows, single = {}, None
    for name, variant in strategies(config).items():
        if stop.is_set():
            break
        with story.on_mesh(variant):
            agent, problems, mesh = make_agent(variant, story), task.Problems(config.seed), jax.sharding.get_mesh()
            inputs = (*problems.prompts(config.num_prompts), jax.random.key(0, impl="rbg"))
            batch, _ = story.collect(agent, *inputs)
            # 沒訓練過的模型沒有一個答對；給亂數的優勢，學習才有事做
            noise = np.random.default_rng(0).normal(size=batch.advantages.shape).astype(np.float32)
            batch = batch._replace(advantages=axis_rules.distribute(noise, "batch", None))
            gradients = nnx.jit(nnx.grad(lambda actor: agent.actor_objective(actor, batch)[0]))(agent.actor)  # noqa: B023
            tokens = np.asarray(batch.tokens)
            single = tokens if single is None else single
            rows[name] = {
                "mesh": variant.mesh,
                "rules": variant.rules,
                "bytes": {
                    "policy": device_bytes(nnx.state(agent.actor, nnx.Param)),
                    "gradients": device_bytes(gradients),
                    "moments": device_bytes(nnx.state(agent.actor_optimizer)),
                    "reference": device_bytes(nnx.state(agent.reference, nnx.Param)),
                    "cache": device_bytes(nnx.jit(make_cache, static_argnums=1)(agent.actor, config.rows)),
                },
                "sampling": count_collectives(story.collect.lower(agent, *inputs).compile(), mesh),
                "learning": count_collectives(story.learn.lower(agent, batch, 1).compile(), mesh),
                "sample_seconds": seconds_of(story.collect, agent, *inputs),
                "learn_seconds": seconds_of(story.learn, agent, batch, 1),
                "same_tokens": float(np.mean(tokens == single)),
            }
    return rows


def strategy_table(rows: dict) -> str:
    """Markdown 表格：一個裝置的位元組，與集體通訊。"""
    sizes, calls = [], []
    for name, row in rows.items():
        kilobytes = [f"{row['bytes'][kind] / 1e3:,.0f}" for kind in KINDS]
        seconds = f"{row['sample_seconds']:.2f}", f"{row['learn_seconds']:.2f}", f"{100 * row['same_tokens']:.2f} %"
        sizes.append([f"`{name}`", row["mesh"], *kilobytes, *seconds])
        cells = []
        for phase in ("sampling", "learning"):
            parts = [f"{kind} × {count}，{size / 1e3:,.0f} KB" for kind, (count, size) in row[phase].items()]
            cells.append("；".join(parts) or "沒有")
        calls.append([f"`{name}`", f"`{row['rules']}`" if row["rules"] else "—", *cells])
    header = ("切法", "Mesh", "策略 (KB)", "梯度 (KB)", "動差 (KB)", "參考模型 (KB)", "KV 快取 (KB)")
    first = markdown_table((*header, "收集 (秒)", "學習 (秒)", "詞元同 single"), sizes)
    return first + "\n" + markdown_table(("切法", "規則", "收集裡的集體通訊", "學習裡的集體通訊"), calls)


def draw_strategies(rows: dict, out_dir) -> None:
    """mesh.png：一個裝置上放什麼，與秒數。"""
    names = list(rows)
    with figure(out_dir / "mesh.png", 1, 2, figsize=(11, 3.8), sharey=True) as (_, (left, right)):
        start = np.zeros(len(names))
        for kind in KINDS:
            sizes = np.array([rows[name]["bytes"][kind] for name in names]) / 1e6
            left.barh(names, sizes, left=start, label="KV cache" if kind == "cache" else kind)
            start += sizes
        for offset, phase in ((-0.2, "sample"), (0.2, "learn")):
            seconds = [rows[name][f"{phase}_seconds"] for name in names]
            right.barh(np.arange(len(names)) + offset, seconds, height=0.38, label=f"{phase} one batch")
        left.set(xlabel="MB on one device", title="what one device holds")
        right.set(xlabel="seconds", title="time, eight fake devices on this CPU")
        left.invert_yaxis()
        for axes in (left, right):
            axes.legend(fontsize=9)


# G 與 KV 快取的成本 ----------------------------------------------------------------------------------


def sample_without_cache(actor, prompts: jax.Array, key: jax.Array, group_size: int):
    """和 sample 一樣，但是每寫一個詞元，都把前面的全部重讀一遍。"""
    rows = len(prompts) * group_size
    empty = jnp.full((rows, task.ANSWER_LENGTH), task.PAD, prompts.dtype)
    tokens = jnp.concatenate([jnp.repeat(prompts, group_size, axis=0), empty], axis=1)

    def write(carry, step):
        tokens, ended = carry
        index, key = step
        logits = jax.lax.dynamic_index_in_dim(answer_outputs(actor, tokens), index, axis=1, keepdims=False)
        token = jnp.where(ended, task.PAD, jax.random.categorical(key, logits))
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, task.PROMPT_LENGTH + index, axis=1)
        return (tokens, ended | (token == task.STOP)), None

    keys = jax.random.split(key, task.ANSWER_LENGTH)
    steps = jnp.arange(task.ANSWER_LENGTH), keys
    (tokens, _), _ = jax.lax.scan(write, (tokens, jnp.zeros(rows, bool)), steps)
    return tokens[:, task.PROMPT_LENGTH :]


def measure_cost(config, story: Story, stop) -> list[dict]:
    """G = 2、4、8、16：答案一樣多，或提示一樣多；收集與學習一批的秒數。"""
    rows = []
    for group_size in GROUP_SIZES:
        for same, prompts in (("answers", ANSWERS // group_size), ("prompts", ANSWERS // 8)):
            if stop.is_set():
                return rows
            variant = replace(config, measure="none", num_prompts=prompts, group_size=group_size)
            with story.on_mesh(variant):
                agent, problems = make_agent(variant, story), task.Problems(config.seed)
                questions, sums = problems.prompts(prompts)
                key = jax.random.key(0, impl="rbg")
                cached = nnx.jit(lambda actor, *rest: story.sample(actor, *rest, group_size)[0])  # noqa: B023
                uncached = nnx.jit(lambda actor, *rest: sample_without_cache(actor, *rest, group_size))  # noqa: B023
                batch, _ = story.collect(agent, questions, sums, key)
                written = [np.asarray(f(agent.actor, questions, key)) for f in (cached, uncached)]
                rows.append(
                    {
                        "same": same,
                        "group_size": group_size,
                        "prompts": prompts,
                        "tokens": int(batch.mask.sum()),
                        "cached_seconds": seconds_of(cached, agent.actor, questions, key),
                        "uncached_seconds": seconds_of(uncached, agent.actor, questions, key),
                        "learn_seconds": seconds_of(story.learn, agent, batch, 1),
                        "same_tokens": float(np.mean(written[0] == written[1])),
                    }
                )
    return rows


def cost_table(rows: list[dict]) -> str:
    """Markdown 表格：一批的秒數。"""
    lines = []
    for row in sorted(rows, key=lambda row: row["same"]):
        answers = row["prompts"] * row["group_size"]
        counts = [str(row["group_size"]), str(row["prompts"]), f"{answers:,}", f"{row['tokens']:,}"]
        seconds = [f"{row[f'{name}_seconds']:.2f}" for name in ("cached", "uncached", "learn")]
        lines.append(["答案一樣多" if row["same"] == "answers" else "提示一樣多", *counts, *seconds])
    header = ("比法", "G", "提示", "答案", "詞元", "採樣，有快取 (秒)", "採樣，沒有快取 (秒)", "學習一遍 (秒)")
    return markdown_table(header, lines)


# 80 億參數的帳：算術，不是量的 -----------------------------------------------------------------------


def count_parameters(shape: dict) -> int:
    """Llama 3 的參數：詞彙表兩份、每層的注意力 (鍵與值的頭比較少)、三個 MLP 矩陣、兩個正規化，最後一個正規化。"""
    embed, head_dim = shape["embed"], shape["head_dim"]
    attention = embed * head_dim * (2 * shape["heads"] + 2 * shape["kv_heads"])
    layer = attention + 3 * embed * shape["mlp"] + 2 * embed
    return 2 * shape["vocab"] * embed + shape["layers"] * layer + embed


def measure_ledger(config, story: Story, stop) -> list[dict]:
    """每個參數 2 個位元組 (bfloat16)，同筆記；KV 快取：層 × 2 × kv_heads × head_dim × 2 個位元組，一個詞元。"""
    copy = 2 * LLAMA3_8B["parameters"]
    token = LLAMA3_8B["layers"] * 2 * LLAMA3_8B["kv_heads"] * LLAMA3_8B["head_dim"] * 2
    rows = [
        {"what": "演員：參數、梯度、兩個動差", "bytes": 4 * copy, "grpo": True, "ppo": True},
        {"what": "參考模型：只有參數", "bytes": copy, "grpo": True, "ppo": True},
        {"what": "評論家：參數、梯度、兩個動差", "bytes": 4 * copy, "grpo": False, "ppo": True},
    ]
    for length in ANSWER_LENGTHS:
        answers = config.group_size
        what = f"KV 快取：一個提示的 {answers} 個答案，各 {length:,} 個詞元"
        rows.append({"what": what, "bytes": answers * length * token, "grpo": True, "ppo": True})
    return rows


def ledger_table(rows: list[dict]) -> str:
    """Markdown 表格，1 GB 是 10 的 9 次方個位元組。"""
    lines = []
    for row in rows:
        size = f"{row['bytes'] / 1e9:.1f}"
        lines.append([row["what"], *(size if row[name] else "—" for name in ("grpo", "ppo"))])
    return markdown_table(("Llama 3 8B，全部用 bfloat16 (GB)", "GRPO", "PPO"), lines)


MEASUREMENTS = {
    "mesh": Measurement("strategies", measure_mesh, strategy_table, len(STRATEGIES)),
    "cost": Measurement("cost", measure_cost, cost_table, 2 * len(GROUP_SIZES)),
    "ledger": Measurement("ledger", measure_ledger, ledger_table, 3 + len(ANSWER_LENGTHS)),
}
