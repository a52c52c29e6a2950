"""第 6 課跑完之後看的東西：摘要、圖、印出來的答案、--compare，與少用的旗標要的零件。腳本把要用的函式傳進來。"""

import functools
import math
import time
from pathlib import Path

import axis_rules
import jax
import jax.numpy as jnp
import measurements
import numpy as np
import task
from flax import nnx
from matplotlib.ticker import MaxNLocator
from measurements import cost_table, ledger_table, strategy_table  # noqa: F401  README 的表格都從這個檔案畫
from model import Transformer

import lesson_extras
from lesson_extras import (
    array_bytes,
    derive,
    draw_error,
    draw_mean,
    figure,
    interval,
    markdown_table,
    refuse_changed,
    show_difference,
    show_mean,
)

PASS_KS = (1, 2, 4, 8, 16, 32)
SHOWN_PROMPTS, SHOWN_ANSWERS = 3, 4
SUPERVISED_TEXTS = 2  # 對照組的一段文字平均只有採樣的答案一半長，所以給兩倍的段數


# 旗標 ------------------------------------------------------------------------------------------------


def axis_sizes(config) -> list[tuple[str, int]]:
    """每個邏輯軸會切到的大小；batch 有好幾種。"""
    batches = config.num_prompts, config.rows, task.TEST_PROMPTS
    batches += config.text_rows(config.pretrain_batch_size) + config.text_rows(task.TEST_PROMPTS)
    sizes = {"vocab": task.VOCAB, "embed": config.embed_dim, "mlp": config.mlp_dim, "heads": config.num_heads}
    sizes |= {"head_dim": config.embed_dim // config.num_heads, "position": task.PROMPT_LENGTH + task.ANSWER_LENGTH}
    if config.algorithm == "supervised":
        batches += config.text_rows(SUPERVISED_TEXTS * config.rows)
    return [*sizes.items(), *(("batch", size) for size in batches)]


def on_mesh(config):
    """with on_mesh(config)：裡面的權重、快取與批次都照 config 的規則手冊切。"""
    rules = axis_rules.parse_rules(config.rules)
    return axis_rules.rule_book(axis_rules.make_mesh(config.mesh, rules, axis_sizes(config)), rules)


def check_experiments(config) -> None:
    """--measure 與 --compare 自己決定的旗標，不能另外給；它們要跑的設定也先檢查一遍。"""
    if 0 < config.step_by_step_share < 1 and 0 in config.text_rows(config.pretrain_batch_size):
        wrong = f"--step-by-step-share 是 {config.step_by_step_share}，一步 {config.pretrain_batch_size} 段文字湊不出來"
        raise ValueError(f"{wrong}；逐步作答的段數是 8 的倍數，把 --pretrain-batch-size 調大")
    if config.algorithm == "supervised":
        refuse_changed(config, "--algorithm supervised", ("reward", "beta", "loss_average", "clip_epsilon"))
    if config.base:
        refuse_changed(config, "--base", ("pretrain_steps", "pretrain_batch_size", "pretrain_learning_rate"))
    if config.compare and config.measure != "none":
        raise ValueError(f"--compare 配上 --measure {config.measure}；一次只能做一樣")
    if config.measure != "none":
        measurements.check(config)
    if config.compare and config.coordinator:
        raise ValueError("--compare 配上 --coordinator；--compare 在一個行程裡跑，不要寫 --coordinator")
    if config.compare:
        variants(config)


def load_base(config) -> Transformer:
    """--base 的權重，照規則手冊放好。"""
    model = nnx.jit(lambda: Transformer(config, nnx.Rngs(0)))()
    lesson_extras.load_weights(config.base, model, "--base")
    axis_rules.place(model)
    return model


def measure(run, config, *functions) -> None:
    measurements.measure(run, config, measurements.Story(on_mesh, *functions))


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
    """--algorithm supervised 的紀錄：沒有採樣，長度與逐步作答的比率是文字的；reward、silent、clip_fraction 佔位。"""
    masks = [task.answer_mask(part[..., task.PROMPT_LENGTH :]) for part in texts]
    tokens = float(sum((mask > 0).sum() for mask in masks))  # 用整數加：float32 只數得清到一千六百多萬
    rows = {mask.shape[-1]: math.prod(mask.shape[:-1]) for mask in masks}  # 答案的長度 → 幾段
    stepwise = rows.get(task.ANSWER_LENGTH, 0) / sum(rows.values())
    log = {"reward": 1.0, "length": tokens / sum(rows.values()), "step_by_step": stepwise, "silent": 0.0}
    return log | {"loss": float(losses.mean()), "clip_fraction": 0.0, "tokens": tokens}


# 摘要 ------------------------------------------------------------------------------------------------


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """k 個答案裡至少一個對的機率，不偏估計：1 - C(n - c, k) / C(n, k)；correct (題, n)。Chen 等 (2021)。"""
    n = correct.shape[1]
    missed = [math.comb(n - int(c), k) / math.comb(n, k) for c in correct.sum(axis=1)]
    return float(1 - np.mean(missed))


def percent(values: np.ndarray) -> float | None:
    return 100 * float(np.mean(values)) if len(values) else None


def summarize(prompts: np.ndarray, written: np.ndarray, greedy: np.ndarray, sampled: np.ndarray, loss: float) -> dict:
    """測試題的數字：written 是採樣的答案；greedy (題,) 與 sampled (題, n) 是對錯；loss 是預訓練的文字上的損失。"""
    right, stepwise = sampled.reshape(-1), (written == task.COMMA).any(axis=1)
    shown = written.reshape(*sampled.shape, -1)[:SHOWN_PROMPTS, :SHOWN_ANSWERS]
    return {
        "greedy": percent(greedy),
        "sampled": percent(right),
        "length": float(np.asarray(task.answer_mask(written)).sum(axis=1).mean()),
        "step_by_step": percent(stepwise),
        "right_direct": percent(right[~stepwise]),
        "right_step_by_step": percent(right[stepwise]),
        "unfinished": percent(~(written == task.STOP).any(axis=1)),
        "pass_at_k": {k: 100 * pass_at_k(sampled, k) for k in PASS_KS},
        "examples": {
            task.decode(prompt): [[task.decode(answer), bool(ok)] for answer, ok in zip(rows, marks, strict=False)]
            for prompt, rows, marks in zip(prompts, shown, sampled, strict=False)
        },
        "language_model_loss": loss,
    }


def memory_bytes(agent) -> dict[str, int]:
    """訓練時要記住的東西，整個模型各佔幾個位元組；梯度和參數一樣多。"""
    models = [model for model in (agent.actor, agent.critic) if model]
    optimizers = [optimizer for optimizer in (agent.actor_optimizer, agent.critic_optimizer) if optimizer]
    parameters = array_bytes([nnx.state(model, nnx.Param) for model in models])
    reference = array_bytes(nnx.state(agent.reference, nnx.Param)) if agent.reference else 0
    moments = array_bytes([nnx.state(optimizer) for optimizer in optimizers])
    return {"parameters": parameters, "gradients": parameters, "moments": moments, "reference": reference}


def save(run, config, result, whole: list[Transformer], base: dict, trained: dict) -> None:
    """權重與數字；whole 是基礎模型與訓練之後的，每個裝置都有整份。"""
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


def describe(base: dict, trained: dict, curve: dict[str, list[float]]) -> str:
    """印給人看的結果：同樣的題目，訓練前後各寫了什麼，以及摘要；最後一批全錯，沒有訊號可學，就說出來。"""
    lines = []
    for prompt, before in base["examples"].items():
        lines.append(f"{prompt}")
        for name, answers in (("基礎模型", before), ("訓練之後", trained["examples"][prompt])):
            lines += [f"    {name}  {'對' if right else '錯'}  {answer}" for answer, right in answers]
    rows = []
    names = {"sampled": "採樣，對的 (%)", "greedy": "貪婪，對的 (%)"}
    names |= {"step_by_step": "逐步作答的 (%)", "length": "平均長度 (詞元)"}
    names |= {"right_direct": "直接作答時，對的 (%)", "right_step_by_step": "逐步作答時，對的 (%)"}
    for key, name in names.items():
        rows.append([name, *("—" if x[key] is None else f"{x[key]:.1f}" for x in (base, trained))])
    for k in (1, 4, 32):
        rows.append([f"pass@{k} (%)", *(f"{x['pass_at_k'][k]:.1f}" for x in (base, trained))])
    rows.append(["預訓練的文字上的損失", *(f"{x['language_model_loss']:.3f}" for x in (base, trained))])
    table = "\n".join(lines) + "\n\n" + markdown_table(("測試題", "基礎模型", "訓練之後"), rows)
    nothing_learnt = curve["silent"][-1] == 1 and curve["reward"][-1] == 0
    return table + "\n最後一批的答案全錯，優勢都是 0，沒有學到東西；預訓練久一點，或把學習率調小再試\n" * nothing_learnt


# 圖 --------------------------------------------------------------------------------------------------


def draw(result, config, base: dict, trained: dict) -> None:
    draw_learning_curve(result, config)
    draw_pass_at_k({"base": base, "trained": trained}, config)


def draw_learning_curve(result, config) -> None:
    """正確率、逐步作答的比率、長度，一張圖；下面是沒有訊號的題目。"""
    curve, updates = result.curve, np.arange(1, result.updates + 1)
    options = {"figsize": (7, 5.6), "layout": "none", "sharex": True, "height_ratios": [3, 1]}
    with figure(config.out_dir / "learning_curve.png", 2, 1, **options) as (canvas, (top, bottom)):
        canvas.subplots_adjust(left=0.1, right=0.9, bottom=0.09, top=0.94, hspace=0.1)
        top.plot(updates, 100 * np.array(curve["reward"]), "o-", ms=3, color="C0", label="reward, sampled")
        top.plot(updates, 100 * np.array(curve["step_by_step"]), "s-", ms=3, color="C1", label="step-by-step answers")
        top.set(ylabel="%", ylim=(-3, 103), title=f"{config.algorithm}: one batch of {config.rows} answers per update")
        length = top.twinx()
        length.plot(updates, curve["length"], "^--", ms=3, color="C2", label="length (right axis)")
        length.set(ylabel="tokens per answer", ylim=(0, task.ANSWER_LENGTH + 1))
        length.grid(False)
        length.spines["right"].set_visible(True)
        handles = [*top.get_lines(), *length.get_lines()]
        top.legend(handles, [line.get_label() for line in handles], loc="lower right")
        bottom.plot(updates, 100 * np.array(curve["silent"]), "o-", ms=3, color="C3")
        bottom.set(ylabel="silent groups (%)", xlabel="update", ylim=(-3, 103))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_pass_at_k(rows: dict, config) -> None:
    """pass@k：k 個答案裡至少一個對。"""
    with figure(config.out_dir / "pass_at_k.png", figsize=(6, 3.8), layout="none") as (canvas, axes):
        canvas.subplots_adjust(left=0.12, right=0.97, bottom=0.13, top=0.92)
        for name, row in rows.items():
            axes.plot(PASS_KS, list(row["pass_at_k"].values()), "o-", label=name)
        axes.set(
            xscale="log", xlabel="k", ylabel="pass@k (%)", ylim=(0, 103), title="at least one of k answers is right"
        )
        axes.set_xticks(PASS_KS, labels=map(str, PASS_KS))
        axes.minorticks_off()
        axes.legend(loc="lower right")


# 比較 ------------------------------------------------------------------------------------------------

DEFAULT = "default"
TUNED = ("algorithm", "beta", "reward", "loss_average", "dynamic_sampling", "train_epochs", "clip_epsilon")
TUNED += ("group_size", "step_by_step_share", "base")


def variants(config) -> dict:
    """--compare 要跑的設定，一次只改一樣。同一個隨機種子的都從同一個基礎模型開始，direct_only 除外。"""
    refuse_changed(config, "--compare", TUNED)
    changes = {
        DEFAULT: {},
        "direct_only": {"step_by_step_share": 0.0},
        "beta_0.3": {"beta": 0.3},
        "last_digit": {"reward": "last-digit"},
        "last_digit_beta_0.3": {"reward": "last-digit", "beta": 0.3},
        "ppo": {"algorithm": "ppo"},
        "supervised": {"algorithm": "supervised"},
        "dapo": {"loss_average": "dapo"},
        "dr_grpo": {"loss_average": "dr_grpo"},
        "K_4": {"train_epochs": 4},
        "K_4_no_clip": {"train_epochs": 4, "clip_epsilon": 1.0},
        "dynamic_sampling": {"dynamic_sampling": True},
        "beta_0.05": {"beta": 0.05},
        **{f"G_{g}": {"num_prompts": max(1, config.rows // g), "group_size": g} for g in (2, 16)},
    }
    return {name: derive(name, config, **changed) for name, changed in changes.items()}


def compare(run, config, train, evaluate) -> None:
    bases = {}  # 一個隨機種子的基礎模型；換種子就丟掉

    def measure(_, variant) -> dict:
        key = variant.seed, variant.step_by_step_share
        if not any(seed == variant.seed for seed, _ in bases):
            bases.clear()
        result = train(variant, run.stop, progress=False, base=bases.get(key, (None, None))[0])
        if result.interrupted:
            return {}
        if key not in bases:
            bases[key] = result.base, evaluate(result.base, variant)
        trained, memory = evaluate(result.agent.actor, variant), memory_bytes(result.agent)
        return columns(bases[key][1], trained, result.curve, result.seconds, memory)

    lesson_extras.compare(run, config, variants(config), measure, comparison_table, draw_comparison)


def columns(base: dict, trained: dict, curve: dict, seconds: dict, memory: dict) -> dict:
    """一個種子、一種設定的一列，都是 metrics.json 裡的數字。"""
    names = ("sampled", "greedy", "length", "step_by_step", "language_model_loss", "unfinished")
    row = {name: trained[name] for name in names} | {f"base_{name}": base[name] for name in names}
    row |= {"pass_at_k": list(trained["pass_at_k"].values()), "base_pass_at_k": list(base["pass_at_k"].values())}
    row |= {f"{name}_curve": curve[name] for name in ("reward", "length", "step_by_step", "silent", "clip_fraction")}
    row |= {"tokens": float(np.sum(curve["tokens"])), "state_bytes": sum(memory.values())}
    return row | {f"{phase}_seconds": seconds[phase] for phase in ("sample", "learn")}


def of_last_updates(curves, updates: int = 5) -> np.ndarray:
    """每個種子最後幾個階段的平均，百分比。"""
    return 100 * np.array(curves)[:, -updates:].mean(axis=1)


def comparison_table(rows: dict) -> str:
    """三張 Markdown 表格：正確率與忘了多少、pass@k、學習的樣子與代價。"""
    quality, passes, costs = [], [], []
    for name, row in rows.items():
        pairs = min(len(row["sampled"]), len(rows[DEFAULT]["sampled"]))  # 同一個隨機種子的相減
        cells = [show_mean(row["sampled"]), f"{min(row['sampled']):.1f}", show_mean(row["greedy"])]
        for column in ("sampled", "greedy"):
            difference = show_difference(row[column][:pairs], rows[DEFAULT][column][:pairs])
            cells.append("—" if name == DEFAULT else difference)
        cells += [show_mean(row["length"]), show_mean(row["step_by_step"], "{:.0f}")]
        quality.append([f"`{name}`", *cells, show_mean(row["language_model_loss"], "{:.2f}")])
        silent, clip_fraction = (100 * np.mean(row[f"{key}_curve"], axis=1) for key in ("silent", "clip_fraction"))
        cells = [show_mean(of_last_updates(row["reward_curve"])), show_mean(silent, "{:.0f}"), show_mean(clip_fraction)]
        if name == "supervised":  # 沒有採樣，這三個數不是量的
            cells = ["—"] * len(cells)
        cells += [show_mean(np.array(row["tokens"]) / 1e3, "{:,.0f}")]
        cells += [f"{np.median(row[f'{phase}_seconds']):.1f}" for phase in ("sample", "learn")]
        costs.append([f"`{name}`", *cells, f"{np.mean(row['state_bytes']) / 1e6:.1f}"])
    for name in (DEFAULT, "direct_only"):
        for column, title in (("base_pass_at_k", "基礎模型"), ("pass_at_k", "訓練之後")):
            if name in rows:
                passes.append([f"`{name}`，{title}", *map(show_mean, np.transpose(rows[name][column]))])
    header = ("做法", "採樣 (%)", "最差的種子", "貪婪 (%)", "採樣，與 default 的差", "貪婪，與 default 的差")
    first = markdown_table((*header, "長度", "逐步作答 (%)", "預訓練文字的損失"), quality)
    second = markdown_table(("pass@k (%)", *(f"k = {k}" for k in PASS_KS)), passes)
    header = ("做法", "自己的獎勵 (%)", "沒有訊號的題目 (%)", "最後一遍越界的詞元 (%)", "採樣的詞元 (千)")
    return "\n".join([first, second, markdown_table((*header, "收集 (秒)", "學習 (秒)", "訓練狀態 (MB)"), costs)])


def draw_comparison(rows: dict, out_dir: Path) -> None:
    """comparison.png：學習曲線、pass@k、β 換來什麼、鑽漏洞、沒有訊號的題目、與 default 的差；沒跑的就不畫。"""
    rows = lesson_extras.draw_whole(rows)
    with figure(out_dir / "comparison.png", 2, 3, figsize=(15, 8.4)) as (canvas, panels):
        (curve, passes, forget), (hack, silent, gap) = panels
        canvas.suptitle(f"mean and 95 % interval, {len(rows[DEFAULT]['sampled'])} seeds", fontsize=11)
        draw_curves(rows[DEFAULT], curve)
        draw_passes(rows, passes)
        draw_forgetting(rows, forget)
        draw_hacking(rows, hack)
        hack.set_visible("last_digit" in rows)  # 中斷時還沒有這一列
        for name in (DEFAULT, "G_2", "G_16", "dynamic_sampling"):
            if name in rows:
                values = 100 * np.array(rows[name]["silent_curve"])
                draw_mean(silent, np.arange(1, values.shape[1] + 1), values, label=name)
        silent.set(xlabel="update", ylabel="silent groups sampled (%)", title="no signal: all right or all wrong")
        draw_differences(rows, gap)
        for axes in (curve, silent):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (passes, forget, hack, silent):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)


def draw_curves(row: dict, axes) -> None:
    """正確率、逐步作答的比率與長度。"""
    length = axes.twinx()
    for target, column, scale, color, label in (
        (axes, "reward_curve", 100, "C0", "right, sampled"),
        (axes, "step_by_step_curve", 100, "C1", "step-by-step answers"),
        (length, "length_curve", 1, "C2", "length (right axis)"),
    ):
        curves = scale * np.array(row[column])
        updates = np.arange(1, curves.shape[1] + 1)
        draw_mean(target, updates, curves, linestyle="--" if target is length else "-", color=color, label=label)
    axes.set(xlabel="update", ylabel="%", ylim=(0, 103), title="answers get longer because that pays")
    length.set(ylabel="tokens per answer", ylim=(0, task.ANSWER_LENGTH))
    length.grid(False)
    length.spines["right"].set_visible(True)
    handles = [*axes.get_lines(), *length.get_lines()]
    axes.legend(handles, [line.get_label() for line in handles], fontsize=8, loc="lower right")


def draw_passes(rows: dict, axes) -> None:
    titles = {DEFAULT: "has seen step by step", "direct_only": "never seen step by step"}
    for color, (name, title) in enumerate(titles.items()):
        for column, model, style in (("base_pass_at_k", "base", ":"), ("pass_at_k", "trained", "-")):
            if name in rows:
                label = {"color": f"C{color}", "label": f"{model}, {title}"}
                draw_mean(axes, PASS_KS, rows[name][column], linestyle=style, marker="o", **label)
    axes.set(xscale="log", xlabel="k", ylabel="pass@k (%)", title="it sharpens: at least one of k is right")
    axes.set_xticks(PASS_KS, labels=map(str, PASS_KS))
    axes.minorticks_off()


def draw_forgetting(rows: dict, axes) -> None:
    betas = {"β = 0": DEFAULT, "β = 0.05": "beta_0.05", "β = 0.3": "beta_0.3"}
    betas = {label: name for label, name in betas.items() if name in rows}
    for i, name in enumerate(betas.values()):
        losses = rows[name]["language_model_loss"]
        label = {} if i else {"label": "after training"}
        axes.bar(i, np.mean(losses), yerr=draw_error(losses), width=0.5, color="C0", capsize=4, **label)
    axes.set_xticks(range(len(betas)), labels=list(betas))
    axes.axhline(np.mean(rows[DEFAULT]["base_language_model_loss"]), color="0.3", ls=":", label="base model")
    axes.set(ylabel="nat per answer token", title="forgetting: loss on the pretraining text")


def draw_hacking(rows: dict, axes) -> None:
    pairs = {"β = 0": "last_digit", "β = 0.3": "last_digit_beta_0.3"}
    pairs = {label: name for label, name in pairs.items() if name in rows}
    for j, name in enumerate(pairs.values()):
        own = of_last_updates(rows[name]["reward_curve"])
        bars = {"its reward": own, "right, sampled": rows[name]["sampled"], "right, greedy": rows[name]["greedy"]}
        for i, (label, values) in enumerate(bars.items()):
            style = {"color": f"C{i}", "capsize": 4} | ({} if j else {"label": label})
            axes.bar(j + 0.27 * (i - 1), np.mean(values), yerr=draw_error(values), width=0.25, **style)
    axes.set_xticks(range(len(pairs)), labels=list(pairs))
    axes.set(ylabel="%", title="reward that checks the last digit only", ylim=(0, 130))


def draw_differences(rows: dict, axes) -> None:
    """每一種做法與 default 的差，採樣的正確率，與 95 % 信賴區間。"""
    names = [name for name in rows if name != DEFAULT]
    for i, name in enumerate(names):
        pairs = min(len(rows[name]["sampled"]), len(rows[DEFAULT]["sampled"]))
        difference = np.subtract(rows[name]["sampled"][:pairs], rows[DEFAULT]["sampled"][:pairs])
        axes.plot(interval(difference), [i, i], color="C0", lw=2)
        axes.plot(difference.mean(), i, "o", color="C0")
    axes.axvline(0, color="0.3", lw=1)
    axes.set_xscale("symlog", linthresh=5)
    ticks = [tick for tick in (-100, -50, -20, -5, 0, 5, 20, 50) if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), labels=names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="percentage points (linear up to 5)", title="right, sampled: difference to default")
