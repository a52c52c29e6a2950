"""第 5 課：切分的數學對照獨立的算法，兩個行程的執行，以及完整的預設執行。"""

import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from flax.core.spmd import get_pspec
from hypothesis import given, settings
from lessons import ROOT, SHORT, block, defaults, environment, load, metrics, run, script, short_environment

demo = load("5_Sharding_Demo")
llama_file = importlib.import_module("llama")
collectives_file = importlib.import_module("collectives")
ledger_file, chips_file = demo.ledger, demo.chips
traffic_file, text_file = importlib.import_module("traffic"), importlib.import_module("byte_text")
devices_file = importlib.import_module("sharding_devices")
README = ROOT / "5_Sharding_Demo" / "README.md"
STRATEGIES = list(demo.RULES)


def small_config(**changes):
    sizes = {"batch_size": 8, "sequence_length": 12, "num_layers": 1, "embed_dim": 32, "mlp_dim": 48}
    return demo.Config(**sizes | {"num_heads": 8, "learning_rate": 0.01} | changes)


# 規則手冊 --------------------------------------------------------------------------------------------

targets = st.sampled_from([None, "data", "model", ("data", "model"), ("model", "data")])
rule_books = st.fixed_dictionaries(dict.fromkeys(demo.AXES, targets))


def flat_axes(spec):
    return [name for entry in spec for name in (entry if isinstance(entry, tuple) else [entry]) if name]


@given(rule_books)
@settings(max_examples=300)
def test_accepted_rules_never_use_a_mesh_axis_twice(rules):
    """check_rules 放行，等於每個陣列的 PartitionSpec 都沒有重複的 Mesh 軸。"""
    specs = [demo.translate(axes, rules) for axes in [*demo.WEIGHTS.values(), *demo.ACTIVATIONS.values()]]
    repeated = any(len(set(flat_axes(spec))) < len(flat_axes(spec)) for spec in specs)
    try:
        demo.check_rules("custom", rules)
        refused = False
    except ValueError:
        refused = True
    assert refused == repeated


@given(rule_books)
def test_translation_is_flax_own(rules):
    with demo.nnx.logical_axis_rules(tuple(rules.items())):
        for axes in [*demo.WEIGHTS.values(), *demo.ACTIVATIONS.values()]:  # llama.constrain 用的是 Flax 的
            assert demo.translate(axes, rules) == get_pspec(axes)


@given(
    rule_books,
    st.integers(1, 9),
    st.integers(1, 9),
    st.fixed_dictionaries(dict.fromkeys(demo.AXES, st.integers(1, 64))),
)
def test_indivisible_finds_exactly_what_jax_refuses(rules, data, model, sizes):
    mesh = jax.sharding.AbstractMesh((data, model), ("data", "model"))
    refused = set()
    for axis in demo.AXES:
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(rules[axis]))
        try:
            sharding.shard_shape((sizes[axis],))
        except ValueError:
            refused.add(axis)
    found = demo.indivisible(rules, sizes, {"data": data, "model": model})
    assert (found is None) == (not refused)
    if found:
        assert found[0] in refused
        assert sizes[found[0]] % found[1] != 0


@given(rule_books)
def test_rules_survive_the_command_line(rules):
    text = ",".join(f"{axis}={demo.extras.show_target(target)}" for axis, target in rules.items())
    assert demo.parse_rules(text) == rules


def test_the_notes_rule_book():
    """筆記 6.4 的例子：nnx.Linear 的 ('embed', 'mlp') 切成兩塊，批次切成四份。"""
    config = demo.Config(rules="batch=data,mlp=model,embed=None")
    rules = demo.rule_books(config)["custom"]
    assert demo.translate(("embed", "mlp"), rules) == jax.sharding.PartitionSpec(None, "model")
    assert demo.translate(("batch", "sequence"), rules) == jax.sharding.PartitionSpec("data", None)


# 模型 ------------------------------------------------------------------------------------------------


def numpy_loss(weights, llama, inputs, targets):
    """同一個 Llama，用 NumPy 的 float64 與迴圈再寫一次。"""

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # (位置, head_dim)：一對數字當成複數，乘上 e^{i·位置·頻率}
        half = x.shape[-1] // 2
        angle = np.arange(len(x))[:, None] * 500_000.0 ** (-np.arange(half) / half)
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    losses = []
    for tokens, nexts in zip(inputs, targets, strict=True):
        x = weights["embedding"][tokens]
        for i in range(llama.layers):
            w = {name: weights[name][i] for name in demo.WEIGHTS if demo.WEIGHTS[name][0] == "layers"}
            h, added = norm(x, w["attention_norm"]), 0
            for head in range(llama.heads):
                kv = head // (llama.heads // llama.kv_heads)
                q, k, v = rotate(h @ w["query"][:, head]), rotate(h @ w["key"][:, kv]), h @ w["value"][:, kv]
                scores = q @ k.T / math.sqrt(llama.head_dim)
                scores[np.triu_indices(len(x), 1)] = -np.inf
                p = np.exp(scores - scores.max(-1, keepdims=True))
                added = added + (p / p.sum(-1, keepdims=True)) @ v @ w["out"][head]
            x = x + added
            h = norm(x, w["mlp_norm"])
            gate = h @ w["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"])) @ w["down"]
        logits = norm(x, weights["final_norm"]) @ weights["lm_head"]
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(nexts)), nexts])
    return np.mean(losses)


@functools.cache
def trajectory(strategy, mesh="4x2", steps=3):
    """一種策略的每一步損失、第一步的梯度、最後的狀態與編譯好的程式。"""
    config = small_config(mesh=mesh, num_kv_heads=8)
    rng, losses, first = np.random.default_rng(0), [], None
    program = plan(config, strategy)
    step, state = demo.compile_step(program), demo.initial_state(program, config)
    parameters = demo.nnx.filter_state(state, demo.nnx.Param)
    start = {path[-1]: np.asarray(array[...]) for path, array in leaves(parameters)}
    for _ in range(steps):
        batch = [rng.integers(0, 256, (8, 12)).astype(np.int32) for _ in range(2)]
        state, loss, gradients = step(state, *(demo.distribute(x, program.tokens) for x in batch))
        losses.append(float(loss))
        if first is None:
            first = batch, gradients
    return config, losses, first, state, start, demo.read_collectives(step.as_text(), program.mesh), step


def plan(config, strategy):
    mesh, rules = demo.strategy_mesh(config, strategy), demo.rule_books(config)[strategy]
    sizes = config.batch_size, config.sequence_length
    return demo.plan(config.llama, config.learning_rate, mesh, rules, *sizes)


def on_one_device(config):
    return demo.rule_book(demo.strategy_mesh(config, "single"), demo.rule_books(config)["single"])


def leaves(state):
    return demo.nnx.to_flat_state(state)


def test_the_model_is_the_llama_written_in_numpy():
    config, losses, (batch, _), _, start, _, _ = trajectory("single")
    expected = numpy_loss({name: array.astype(float) for name, array in start.items()}, config.llama, *batch)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_grouped_query_attention_is_the_llama_written_in_numpy():
    config = small_config(num_kv_heads=2, num_layers=2)
    with on_one_device(config):
        model, _ = demo.create(config.llama, 0.01, seed=1)
        batch = np.random.default_rng(1).integers(0, 256, (2, 3, 7))
        weights = {path[-1]: np.asarray(array[...], float) for path, array in leaves(demo.nnx.state(model))}
        loss = float(jax.jit(demo.cross_entropy)(model, *batch))
    assert loss == pytest.approx(numpy_loss(weights, config.llama, *batch), rel=1e-5)


def test_rematerialisation_changes_nothing():
    config = small_config()
    batch = np.random.default_rng(1).integers(0, 256, (2, 3, 7))
    results = []
    with on_one_device(config):
        for remat in (False, True):
            model, _ = demo.create(dataclasses.replace(config.llama, remat=remat), 0.01, seed=1)
            results.append(jax.tree.leaves(jax.jit(demo.nnx.value_and_grad(demo.cross_entropy))(model, *batch)))
    for plain, again in zip(*results, strict=True):
        np.testing.assert_allclose(plain, again, rtol=1e-4, atol=1e-6)


# 五種策略 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_losses_and_gradients_equal_those_of_one_device(strategy):
    _, losses, (_, gradients), state, *_ = trajectory(strategy)
    _, reference, (_, expected), reference_state, *_ = trajectory("single")
    np.testing.assert_allclose(losses, reference, rtol=1e-5)
    assert reference[-1] != reference[0]
    for tree, other in ((gradients, expected), (state, reference_state)):
        for ours, theirs in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_on_every_device_equal_the_arithmetic_of_the_rules(strategy):
    """每個權重、它的梯度與兩個動差：大小除以規則切成的份數，一個位元組都不差。"""
    _, _, (_, gradients), state, *_ = trajectory(strategy)
    sizes = {"vocab": 256, "embed": 32, "mlp": 48, "heads": 8, "kv_heads": 8, "head_dim": 4, "layers": 1}
    parts = {"data": 4, "model": 2}
    seen = 0
    for tree in (state, gradients):
        for path, variable in leaves(tree):
            if path[-1] not in demo.WEIGHTS:
                continue  # Adam 數步數的計數器
            whole = cut = 4
            for axis in demo.WEIGHTS[path[-1]]:
                target = demo.RULES[strategy].get(axis) or ()
                whole *= sizes[axis]
                cut *= sizes[axis]
                for name in (target,) if isinstance(target, str) else target:
                    cut //= parts[name]
            array = variable[...]
            assert array.nbytes == whole
            assert {shard.data.nbytes for shard in array.addressable_shards} == {cut}
            assert len(array.addressable_shards) == (1 if strategy == "single" else 8)
            seen += 1
    assert seen == 4 * len(demo.WEIGHTS)


def test_device_bytes_counts_only_the_first_device():
    _, _, (_, gradients), *_ = trajectory("model")
    shards = [shard for array in jax.tree.leaves(gradients) for shard in array.addressable_shards]
    assert demo.extras.device_bytes(gradients) == sum(s.data.nbytes for s in shards if s.device.id == 0)
    assert demo.extras.device_bytes(gradients) * 8 == sum(s.data.nbytes for s in shards)


def collectives(strategy, mesh="4x2"):
    return trajectory(strategy, mesh, 1 if mesh != "4x2" else 3)[5]


def parameter_bytes():
    return sum(array.nbytes for array in trajectory("single")[4].values())


def test_one_device_needs_no_communication():
    assert collectives("single") == []


def test_data_parallelism_only_sums_the_gradients():
    """每個梯度相加一次，再加上損失的一個 float32；沒有別的。"""
    found = collectives("data")
    assert {(c.operation, c.axes) for c in found} == {("all-reduce", ("data", "model"))}
    assert sum(c.bytes for c in found) == parameter_bytes() + 4


def test_model_parallelism_sums_activations_and_no_gradient_of_a_split_weight():
    found = collectives("model")
    assert {c.operation for c in found} == {"all-reduce"}
    shapes = {dims for c in found for dims in re.findall(r"f32\[([\d,]+)\]", c.line)}
    assert "8,12,32" in shapes  # 整個批次的殘差流：批次沒有切
    assert shapes <= {"8,12,32", "8,12", "8,12,1"}  # 其餘是損失用的，一個詞元一個數字；沒有權重的形狀


def test_both_axes_divide_the_work():
    found = collectives("data_model")
    assert {(c.operation, c.axes) for c in found} == {("all-reduce", ("model",)), ("all-reduce", ("data",))}
    gradients = sum(c.bytes for c in found if c.axes == ("data",))
    (_, _, (_, arrays), *_) = trajectory("data_model")
    assert gradients == demo.extras.device_bytes(arrays) + 4  # 切過的梯度，加上損失


def test_one_device_on_the_data_axis_sums_no_gradients():
    assert {c.axes for c in collectives("data_model", "1x8")} == {("model",)}
    assert {c.axes for c in collectives("data_model", "8x1")} == {("data",)}


def test_fsdp_gathers_the_weights_it_has_split():
    gathered = [c for c in collectives("fsdp") if c.operation == "all-gather" and "data" in c.axes]
    weights = [array for name, array in trajectory("single")[4].items() if "norm" not in name]
    half = sum(array.nbytes for array in weights) / 2  # 用之前，沿著 data 軸收齊自己的那一半
    assert sum(c.bytes for c in gathered) >= half
    assert not any(c.operation == "all-gather" for c in collectives("data_model"))


def test_without_constraints_the_compiler_communicates_much_more(monkeypatch):
    """README 程式導讀第 3 點：FSDP 拿掉 constrain。"""
    expected = sum(c.bytes for c in collectives("fsdp"))
    monkeypatch.setattr(llama_file, "constrain", lambda x, name: x)
    program = plan(small_config(num_kv_heads=8), "fsdp")
    step = demo.compile_step(program)
    assert sum(c.bytes for c in demo.read_collectives(step.as_text(), program.mesh)) > 1.3 * expected


def test_every_collective_is_outside_of_a_loop():
    """迴圈裡的通訊會執行很多次，數一次就少算了；訓練的程式因此攤開各層的迴圈。"""
    for strategy in STRATEGIES:
        config, *_, step = trajectory(strategy)
        text, mesh = step.as_text(), demo.strategy_mesh(config, strategy)
        entry = text[text.index("\nENTRY ") :]  # 只執行一次的部分
        assert demo.read_collectives(entry, mesh) == demo.read_collectives(text, mesh)


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
    ],
)
def test_device_groups_reads_every_notation(line, groups):
    np.testing.assert_array_equal(collectives_file.device_groups(line), groups)


def test_an_unknown_notation_is_counted_and_marked():
    assert collectives_file.device_groups("replica_groups=?") is None
    found = demo.read_collectives("%a = f32[2] all-reduce(%x), replica_groups=?", demo.make_mesh({"data": 8}))
    assert [c[:3] for c in found] == [("all-reduce", ("?",), 8)]


PROGRAM = """
  %a = (f32[2,3]{1,0}, /*index=1*/bf16[4]{0}) all-reduce(%x, %y), replica_groups=[4,2]<=[8], metadata={op_name="z"}
  %b = f32[10]{0} reduce-scatter(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %c = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[1,8]<=[8]
  %d = (f32[8]{0}, f32[4]{0}) all-reduce-done(%c)
  %f = (f32[2]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %g = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %e = f32[] add(%p, %q), metadata={op_name="all-reduce(x)"}
"""


def test_reading_collectives_from_a_program():
    mesh = demo.make_mesh({"data": 4, "model": 2})
    found = demo.read_collectives(PROGRAM, mesh)
    assert [c[:3] for c in found] == [
        ("all-reduce", ("model",), 2 * 3 * 4 + 4 * 2),
        ("reduce-scatter", ("data",), 4 * 10 * 4),  # 通訊前是通訊後的四倍
        ("all-reduce", ("data", "model"), (8 + 4) * 4),
        ("all-gather", ("data",), 8 * 4),
        ("collective-permute", ("model",), 3 * 4),
    ]
    assert "metadata" not in found[0].line


# 替手邊沒有的晶片編譯 --------------------------------------------------------------------------------

TPU_PROGRAM = """
%all-reduce-scatter.7 (input_0: f32[192,128]) -> f32[192,32] {
  %all-reduce.1 = f32[192,128]{0,1:T(8,128)} all-reduce(%input_0), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %dynamic-slice.2 = f32[192,32]{0,1:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %start)
}

ENTRY %main (a: f32[4,128]) -> f32[4,128] {
  %all-reduce.2 = f32[4,128]{1,0:T(4,128)} all-reduce(%a), replica_groups=[4,2]<=[8], to_apply=%add
  %fusion.3 = f32[192,32]{0,1:T(8,128)} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_a_reduce_scatter_of_the_tpu_is_recognised():
    found = traffic_file.read_chip_collectives(TPU_PROGRAM, demo.make_mesh({"data": 4, "model": 2}))
    assert [c[:3] for c in found] == [
        ("reduce-scatter", ("data",), 192 * 128 * 4),  # 通訊前的那一邊
        ("all-reduce", ("model",), 4 * 128 * 4),
    ]


@pytest.fixture
def only_compiles(monkeypatch):
    """--compile-for 在這個行程裡關掉編譯快取、不印 XLA 的抱怨；之後的測試還要用。"""
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "1")
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def fake_chips(monkeypatch, only_compiles):
    """測試的環境沒有別的編譯器：晶片的描述換成這裡的假裝置。"""

    def describe(chip, shape):
        return demo.make_mesh(shape, jax.devices()[: math.prod(shape.values())])

    for module in (chips_file, ledger_file):
        monkeypatch.setattr(module, "describe", describe)
        monkeypatch.setattr(module, "compiler", lambda chip: f"{chip} 1.0")


def test_compiling_for_a_chip_trains_nothing_and_lists_its_collectives(fake_chips, monkeypatch, capsys, tmp_path):
    sizes = "--batch-size 8 --sequence-length 12 --num-layers 1 --embed-dim 32 --mlp-dim 48 --num-heads 8"
    run_main(monkeypatch, *f"--compile-for h100 --strategies data {sizes} --out-dir {tmp_path}".split())
    (row,) = metrics(tmp_path)["compiled"]
    assert (row["chip"], row["compiler"], row["strategy"]) == ("h100", "h100 1.0", "data")
    assert row["collectives"] == collectives_file.summarize(collectives("data"))
    assert chips_file.collectives_table([row]) in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "collectives_data_h100.txt"}


def test_ctrl_c_while_compiling_for_a_chip_writes_nothing(fake_chips, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "compile_for", lambda *_: demo.RUN.stop.set())
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--compile-for", "v5p", "--strategies", "fsdp", "--out-dir", str(tmp_path))
    assert stopped.value.code == 130
    assert not list(tmp_path.iterdir())


def test_the_ledger_of_a_chip_counts_the_temporaries(fake_chips, monkeypatch, tmp_path):
    rows = {"chip": "h100", "compiler": "c", "model": "llama3-8b", "mesh": "1x1", "strategy": "s", "state": 6e10}
    for temporary, fits in ((1e10, "是"), (1.1e10, "否")):
        table = ledger_file.ledger_table([rows | {"gradients": 1e10, "temporary": temporary}])
        assert table.splitlines()[0].endswith("H100 編譯器的暫存 | 放得進 80 GB |")
        assert table.splitlines()[2].endswith(f"| {temporary / 1e9:.2f} | {fits} |")
    llama = demo.Llama(64, 32, 64, 8, 8, 4, 2, "bfloat16", remat=True)
    rules = demo.rule_books(demo.Config())["fsdp"]
    monkeypatch.setattr(ledger_file, "TOKENS", 8)
    assert demo.ledger_row(llama, "4x2", rules, chip="h100") == demo.ledger_row(llama, "4x2", rules)


def test_what_the_compiler_refuses_as_too_big_is_a_row(monkeypatch):
    def refuse(message):
        def compile_step(*_, **__):
            raise jax.errors.JaxRuntimeError(message)

        return compile_step

    llama, rules = demo.Llama(64, 32, 64, 8, 8, 4, 2, "bfloat16", remat=True), demo.rule_books(demo.Config())["fsdp"]
    monkeypatch.setattr(demo, "compile_step", refuse("RESOURCE_EXHAUSTED: exceeds available HBM"))
    row = demo.ledger_row(llama, "4x2", rules)
    assert row == {"too_big": True}
    names = {"chip": "v5p", "compiler": "c", "model": "llama3-8b", "mesh": "4x2", "strategy": "fsdp"}
    assert "| 4x2 | `fsdp` | 編譯器說放不下 |  |  |  | 否 |" in ledger_file.ledger_table([names | row])
    monkeypatch.setattr(demo, "compile_step", refuse("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError):
        demo.ledger_row(llama, "4x2", rules)


@pytest.mark.parametrize("chip", ["h100", "v5p"])
def test_without_the_compiler_a_sentence_says_what_to_install(chip, only_compiles, monkeypatch, tmp_path):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(chips_file.topologies, "get_topology_desc", missing)
    for name in chips_file.NOT_ON_A_TPU:
        monkeypatch.setenv(name, "")
    with pytest.raises(demo.lesson.LessonError, match=r"的編譯器 \(topology not .*；沒有裝就先 pip install") as refused:
        chips_file.describe(chip, {"data": 8})
    assert refused.value.args[1] == 2
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--ledger", "llama3-8b", "--compile-for", chip, "--out-dir", str(tmp_path))
    assert stopped.value.code == 2
    assert not list(tmp_path.iterdir())


def test_samples_block_equals_the_recorded_run():
    record = json.loads((README.parent / "figures" / "samples.json").read_text(encoding="utf-8"))
    assert record["defaults"] == defaults("5_Sharding_Demo")
    assert block(README.read_text(encoding="utf-8"), "samples") == demo.extras.samples_text(record["rows"])


@pytest.mark.parametrize("name", ["compiled_h100", "compiled_v5p"])
def test_collectives_block_equals_the_recorded_compilation(name):
    record = json.loads((README.parent / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["defaults"] == defaults("5_Sharding_Demo")
    assert block(README.read_text(encoding="utf-8"), name) == demo.extras.collectives_table(record["rows"])
    assert [row["strategy"] for row in record["rows"]] == STRATEGIES[1:]


# 記憶體帳 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", demo.LLAMAS)
def test_the_parameters_of_llama_3(name):
    """公佈的參數個數，與 Flax 真正建立的模型相同。"""
    config, llama = demo.Config(), demo.LLAMAS[name]
    with on_one_device(config):
        model, _ = demo.nnx.eval_shape(lambda: demo.create(llama, 1e-3, 0))
    counted = sum(math.prod(x.shape) for x in jax.tree.leaves(demo.nnx.state(model, demo.nnx.Param)))
    published = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}[name]
    assert counted == llama_file.count_parameters(llama) == llama_file.PUBLISHED_PARAMETERS[name] == published


@pytest.mark.parametrize(("strategy", "share"), [("data", 1), ("fsdp", 8)])
def test_the_compiler_agrees_with_the_arithmetic_of_the_ledger(strategy, share, monkeypatch):
    """小的 Llama：bfloat16 的權重一份、梯度一份、動差兩份，都切成 share 份；另有詞元與兩個計數器。"""
    llama = demo.Llama(64, 32, 64, 8, 8, 4, 2, "bfloat16", remat=True)
    monkeypatch.setattr(ledger_file, "TOKENS", 8)
    row = demo.ledger_row(llama, "4x2", demo.rule_books(demo.Config())[strategy])
    split = 2 * sum(
        math.prod(vars(llama)[axis] for axis in axes) // (share if "norm" not in name else min(share, 4))
        for name, axes in demo.WEIGHTS.items()
    )
    tokens = 2 * 8 * 8 * 4 // (8 if strategy == "data" else 4)
    assert 0 <= row["state"] - (3 * split + tokens) <= 16
    assert 0 <= row["gradients"] - split <= 1000  # 損失，以及輸出的指標表
    kept = demo.ledger_row(llama, "4x2", demo.rule_books(demo.Config())[strategy], return_gradients=False)
    assert kept["state"] == row["state"]
    assert 0 <= kept["gradients"] <= 1000  # 不交出來，梯度就只在暫存裡


def test_chips_fit_what_they_hold():
    assert ledger_file.fitting_chips(16_000_000_000) == "16、32、80、95"
    assert ledger_file.fitting_chips(16_000_000_001) == "32、80、95"
    assert ledger_file.fitting_chips(10**12) == "都不行"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ledger", 18),
        ("ledger_h100", 17),
        ("ledger_v5p", 6),
        ("ledger_70b", 18),
        ("ledger_70b_h100", 17),
        ("ledger_70b_kv", 3),
    ],
)
def test_ledger_block_equals_the_recorded_run(name, rows):
    record = json.loads((README.parent / "figures" / f"{name}.json").read_text(encoding="utf-8"))
    assert record["defaults"] == defaults("5_Sharding_Demo")
    assert block(README.read_text(encoding="utf-8"), name) == demo.extras.ledger_table(record["rows"])
    compiled = [row for row in record["rows"] if "state" in row]
    assert len(compiled) == rows
    books = demo.RULES | {
        "custom": demo.parse_rules("vocab=data+model,heads=data+model,mlp=data+model"),
        **{check: {} for _, check in ledger_file.CHECKS},
    }
    for row in compiled:
        sizes, mesh = vars(demo.LLAMAS[row["model"]]), demo.parse_mesh(row["mesh"])
        check = ledger_file.CHECKS.get((row["mesh"], row["strategy"]), {})
        width = 4 if check.get("dtype") == "float32" else 2

        def part(axis, rules=books[row["strategy"]], sizes=sizes, mesh=mesh):
            return sizes[axis] // math.prod(mesh[name] for name in demo.mesh_axes(rules.get(axis)))

        share = sum(math.prod(map(part, axes)) for axes in demo.WEIGHTS.values())
        assert 0 <= row["state"] - 3 * width * share < 3e6  # 權重與兩個動差，再加一點點詞元與計數器
        assert 0 <= row["gradients"] - width * share * check.get("return_gradients", True) < 1e5


def test_recorded_runs_reach_the_target():
    record = json.loads((README.parent / "figures" / "results.json").read_text(encoding="utf-8"))
    assert all(run["max_relative_difference"] <= demo.TARGET_DIFFERENCE for run in record["runs"])
    assert max(run["peak_mb"] for run in record["runs"]) <= 3000


# 整個執行 --------------------------------------------------------------------------------------------


def run_main(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["sharding_demo.py", *flags])
    demo.RUN.stop.clear()
    demo.RUN(demo.main)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--mesh 3x2", "錯誤：--mesh 3x2 要 6 個裝置，這裡有 8 個；1x8、2x4、4x2、8x1 才合"),
        ("--rules embed=model,mlp=model", "custom 把 gate 的 embed 與 mlp 都切在 model 軸上；"),
        ("--num-kv-heads 4", "錯誤：model 把 kv_heads 的 4 切成 8 份 (data 軸 4 × model 軸 2)，除不盡；要是 8 的倍數"),
        ("--rules width=model", "vocab、embed、layers、heads、head_dim、kv_heads、mlp、batch、sequence"),
        ("--rules batch=data,batch=model", "--rules 的 batch 寫了兩次；"),
        ("--mlp-dim 1000000", "一台筆電放得下 2e+09 個，把模型、批次或序列調小"),
        ("--batch-size 100000", "這樣的模型與批次要存的數太多"),
        ("--num-layers 100 --sequence-length 1024", "這樣的模型與批次要存的數太多"),
        ("--ledger llama3-8b --steps 5", "--ledger llama3-8b 與 --steps 一起用；記憶體帳不訓練，不要寫 --steps"),
        ("--compile-for h100 --steps 5", "--compile-for h100 與 --steps 一起用；只編譯、不訓練，不要寫 --steps"),
        ("--compile-for h100 --strategies single", "--compile-for 看的是通訊，single 沒有通訊；--strategies 至少再寫"),
        ("--compile-for v5p --mesh 3x2", "--compile-for 的 Mesh 3x2 有 6 個裝置；要是 1、2、4、8、16、32、64 個"),
        ("--ledger-meshes 1x64", "--ledger-meshes 只有記憶體帳用得到；要和 --ledger llama3-8b 或 llama3-70b 一起寫"),
    ],
)
def test_messages_say_what_would_be_right(flags, expected, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "300")  # tyro 的方框不折行
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *flags.split(), "--out-dir", str(tmp_path))
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_limit_of_a_laptop_lets_the_experiments_of_the_readme_through():
    for flags in ({}, {"batch_size": 32}, {"mlp_dim": 4096}, {"num_layers": 16}, {"sequence_length": 1024}):
        demo.Config(**flags)
    for flags in ({"mlp_dim": 10**18}, {"batch_size": 10**18}, {"steps": 10**18}, {"embed_dim": 16_000}):
        with pytest.raises(ValueError, match="；"):
            demo.Config(**flags)


@pytest.mark.parametrize(
    ("backend", "variable", "value", "told"),
    [
        ("gpu", "XLA_FLAGS", "", "想用八個假裝置，設 JAX_PLATFORMS=cpu"),
        ("cpu", "XLA_FLAGS", f"--a=b {devices_file.COUNT_FLAG}=6", "環境變數 XLA_FLAGS 設的，拿掉它就有 8 個"),
        ("cpu", "JAX_NUM_CPU_DEVICES", "6", "環境變數 JAX_NUM_CPU_DEVICES 設的，拿掉它就有 8 個"),
    ],
)
def test_a_wrong_number_of_devices_names_its_cause(backend, variable, value, told, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert told in devices_file.right_devices(8, 6, only_compiles=False)
    assert "1x6、2x3、3x2、6x1 才合" in devices_file.right_devices(8, 6, only_compiles=False)
    monkeypatch.setenv(variable, "")
    assert "環境變數" not in devices_file.right_devices(8, 6, only_compiles=False)


def test_a_lost_host_is_told_in_one_sentence():
    program = "import sys, jax, hosts; sys.excepthook = hosts.explain_lost_host; "
    for error, status, last in (
        ("jax.errors.JaxRuntimeError('UNKNOWN: Gloo')", 1, "錯誤：和別的行程斷了線，或裝置出了錯 (UNKNOWN: Gloo)；"),
        ("KeyError(1)", 1, "KeyError: 1"),
    ):
        command = [sys.executable, "-c", f"{program}raise {error}"]
        result = subprocess.run(command, cwd=script("5_Sharding_Demo").parent, capture_output=True, text=True)
        assert result.returncode == status
        assert result.stderr.splitlines()[-1].startswith(last)
        assert ("Traceback" in result.stderr) == ("KeyError" in error)


def test_single_alone_is_compared_with_nothing_and_leaves_nothing_of_an_older_run(tmp_path, call):
    """以前的執行留下的圖與通訊不在新的 metrics.json 裡；讀者自己的檔案不動。"""
    mine = {"placement_mine.png", "collectives_fsdp_notes.txt", "data.txt"}
    old = {f"placement_{name}.png" for name in (*STRATEGIES[1:], "custom")}
    old |= {f"collectives_{name}.txt" for name in (*STRATEGIES, "custom")}
    for name in mine | old:
        (tmp_path / name).write_text("old")
    flags = "--strategies single --steps 1 --num-layers 1 --sequence-length 16"
    status, out, _ = call("5_Sharding_Demo", f"{flags} --out-dir {tmp_path}")
    assert status == 0
    assert "只跑了 single，沒有可以比的" in out
    assert "達標" not in out
    new = {"learning_curve.png", "bytes_and_collectives.png", "collectives_single.txt", "metrics.json"}
    assert {path.name for path in tmp_path.iterdir()} == mine | new
    assert (tmp_path / "collectives_single.txt").read_text(encoding="utf-8") != "old"


@pytest.mark.parametrize(
    ("environment_variables", "flags", "message"),
    [
        (
            {"JAX_NUM_CPU_DEVICES": "1"},
            "--ledger llama3-8b",
            "錯誤：--ledger-meshes 要 64 個裝置，這裡有 1 個；個數是環境變數 JAX_NUM_CPU_DEVICES 設的，",
        ),
        (
            {"XLA_FLAGS": f"{devices_file.COUNT_FLAG}=2"},
            "",
            "錯誤：--mesh 4x2 要 8 個裝置，這裡有 2 個；1x2、2x1 才合；個數是環境變數 XLA_FLAGS 設的，拿掉它就有 8 個",
        ),
        ({"JAX_PLATFORMS": "cuda"}, "", "錯誤：JAX 在這台機器上用不了 JAX_PLATFORMS=cuda；"),
        ({}, "--coordinator auto", "錯誤：--coordinator auto 在這裡找不到 TPU 或 Slurm；要寫第 0 個行程的 HOST:PORT"),
    ],
)
def test_devices_that_are_not_here_are_explained_in_one_sentence(environment_variables, flags, message, tmp_path):
    command = [sys.executable, str(script("5_Sharding_Demo")), *flags.split(), "--out-dir", "out"]
    variables = short_environment() | environment_variables
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


NOTEBOOK = """
import runpy, sys
import jax, jax.numpy as jnp
mine = jnp.arange(3) + 1
assert jax.device_count() == 1
sys.argv = ["sharding_demo.py", *{flags!r}.split()]
runpy.run_path({script!r}, run_name="__main__")
assert jax.device_count() == 8
assert (mine + jnp.arange(3)).tolist() == [1, 3, 5]
"""


def test_in_a_notebook_where_jax_already_runs_with_one_device(tmp_path):
    flags = f"{SHORT['5_Sharding_Demo']} --out-dir out"
    code = NOTEBOOK.format(flags=flags, script=str(script("5_Sharding_Demo")))
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(README.parent)!r}){code}"]
    result = subprocess.run(command, cwd=tmp_path, env=short_environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "out")["device"] == {"platform": "cpu", "count": 8}


def test_a_loss_that_is_not_finite_stops_the_run():
    config = small_config(strategies=("single",), learning_rate=1e30)
    with pytest.raises(demo.lesson.LessonError, match="single 第 2 步的損失不是有限的數；把學習率調小再試") as stopped:
        demo.train(config, progress=False)
    assert stopped.value.args[1] == 1


def test_the_start_is_drawn_once_and_equals_what_every_strategy_would_draw():
    """train 只在一個裝置上抽一次；每個裝置各抽自己那一塊 (initial_state 照 fsdp 的切法)，數字相同。"""
    config = small_config(num_kv_heads=8)
    whole, cut = (demo.initial_state(plan(config, name), config) for name in ("single", "fsdp"))
    for ours, theirs in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_held_out_loss_is_that_of_the_final_weights():
    """evaluate 借用訓練的步驟；對照是另外寫的正向。"""
    config = small_config(num_kv_heads=8)
    program = plan(config, "single")
    step, state = demo.compile_step(program), demo.initial_state(program, config)
    _, held_out = demo.read_text()
    batch = demo.sample_batch(held_out, np.random.default_rng(0), config)
    with on_one_device(config):
        model, _ = demo.nnx.merge(program.graphdef, state)
        expected = float(jax.jit(demo.cross_entropy)(model, *batch))
    assert demo.evaluate(step, state, held_out, program, config) == pytest.approx(expected, rel=1e-6)


def test_ctrl_c_before_the_first_step_trains_nothing_and_one_during_it_keeps_it():
    config, stop = small_config(strategies=("data",), num_kv_heads=8), threading.Event()
    stop.set()
    assert demo.train(config, stop, progress=False) == {}
    stop.clear()
    measure = demo.extras.measure
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.extras, "measure", lambda *args: (stop.set(), measure(*args))[1])
        results = demo.train(dataclasses.replace(config, steps=2), stop, progress=False)
    assert list(results) == ["single"]
    assert len(results["single"].losses) == 2


def start_process(flags, cwd, lesson="5_Sharding_Demo", **options):
    command = [sys.executable, str(script(lesson)), *flags.split()]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"} | options
    return subprocess.Popen(
        command, cwd=cwd, env=short_environment() | {"JAX_ENABLE_COMPILATION_CACHE": "0"}, **options
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("flags", ["", "--ledger llama3-8b"])
def test_ctrl_c_while_programs_are_compiled_writes_nothing(flags, tmp_path):
    """主執行緒在等編譯的執行緒；按一次就說停止中，手上的編譯完就結束。"""
    terminal, child_side = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = start_process(f"{flags} --out-dir out", tmp_path, stderr=child_side)
    os.close(child_side)
    seen, deadline = "", time.monotonic() + 120
    while "編譯" not in seen:
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 1)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    seen += os.read(terminal, 4096).decode(errors="replace")
    os.close(terminal)
    assert process.returncode == 130
    assert "Traceback" not in seen
    assert "再按一次 Ctrl-C" in seen
    written = list(tmp_path.iterdir())
    assert written == [] if "沒有寫任何檔案" in out else flags and "編譯了" in out


@pytest.mark.parametrize(
    ("lesson", "number"), [("5_Sharding_Demo", signal.SIGINT), ("6_GRPO_LLM", signal.SIGTERM)]
)  # 兩課的 hosts.py 相同，各試一種
def test_a_signal_ends_one_of_several_processes_at_once(lesson, number, tmp_path):
    """第 0 個行程在等第 1 個，主執行緒卡在 C++ 裡；不必等到五分鐘的時限。"""
    port = free_port()
    flags = f"--coordinator 127.0.0.1:{port} --num-processes 2 --out-dir out"
    process, deadline = start_process(flags, tmp_path, lesson), time.monotonic() + 120
    while not answers(port):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)  # 接起電話之後，才開始等別人
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lesson", ["5_Sharding_Demo", "6_GRPO_LLM"])
def test_a_port_that_is_taken_is_refused_in_one_sentence(lesson, tmp_path):
    """以前 jaxlib 直接當掉 (segmentation fault)。"""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        coordinator = f"127.0.0.1:{other.getsockname()[1]}"
        process = start_process(f"--coordinator {coordinator} --num-processes 2 --out-dir out", tmp_path, lesson)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"錯誤：--coordinator {coordinator} 的埠開不了 (")
    assert err.endswith("；換一個埠，或結束佔著它的行程\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long")])
def test_a_coordinator_that_is_not_found_is_refused_in_one_sentence(error, monkeypatch):
    """測試不碰網路，所以查名字的那一步用假的。"""

    def getaddrinfo(*_, **__):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(demo.lesson.LessonError) as refused:
        sys.modules["hosts"].check_address(demo.Config(coordinator="no.such.host:9876", num_processes=2, process_id=1))
    message, status = refused.value.args
    assert status == 2
    assert message.startswith("--coordinator no.such.host:9876 查不到 (")
    assert "\n" not in message


def test_a_run_without_collectives_draws_without_warnings(tmp_path, recwarn):
    config = small_config(strategies=("single",), steps=1, out_dir=tmp_path)
    results = demo.train(config, progress=False)
    rows = demo.extras.metrics(results)["strategies"]
    demo.extras.draw(results, rows, tmp_path, demo.TARGET_DIFFERENCE)
    assert not [warning for warning in recwarn if "matplotlib" in str(warning.filename)]
    assert {path.name for path in tmp_path.iterdir()} == {"learning_curve.png", "bytes_and_collectives.png"}


def test_every_block_has_a_color_of_its_own(monkeypatch, tmp_path):
    colors = []
    monkeypatch.setattr(demo.extras, "draw_block", lambda axes, rows, columns, text, color: colors.append(tuple(color)))
    program = plan(small_config(num_kv_heads=8), "fsdp")
    gate = demo.extras.Placed((1, 32, 48), (1, 8, 24), (None, "data", "model"))
    demo.extras.draw_placement(demo.Result("fsdp", program, [], weights={"gate": gate}), tmp_path / "a.png")
    gates = colors[-8:]
    assert len(set(gates)) == 8


def test_writing_samples_from_the_last_prompt_tokens():
    """對照：一個詞元一個詞元，不用 scan，每次都從最近的 PROMPT 個重新讀起。"""
    config = small_config(num_kv_heads=8)
    program = plan(config, "single")
    model, _ = demo.nnx.merge(program.graphdef, demo.initial_state(program, config))
    tokens = [int(token) for token in demo.read_text()[1][: text_file.PROMPT]]
    with on_one_device(config):
        written = jax.jit(lambda prompt: text_file.write(model, prompt))(np.array(tokens, np.int32))
        forward = jax.jit(model)
        for key in jax.random.split(jax.random.key(0), text_file.WRITTEN):
            logits = forward(np.array([tokens[-text_file.PROMPT :]], np.int32))[0, -1]
            tokens.append(int(jax.random.categorical(key, logits)))
    assert written.tolist() == tokens[text_file.PROMPT :]


def test_bytes_that_are_no_letters_do_not_disturb_the_terminal():
    assert text_file.decode(np.array([*"梯度 a".encode(), 0x1B, 10, 0xE6])) == "梯度 a··�"


def test_training_text_follows_the_readmes_and_targets_follow_inputs():
    text, held_out = demo.read_text()
    assert bytes(text[:60].astype(np.uint8)) == README.read_bytes()[:60]
    assert len(held_out) == pytest.approx(len(text) / 9, abs=1)
    inputs, targets = demo.sample_batch(text, np.random.default_rng(0), small_config())
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])


def test_a_readme_edited_during_the_run_changes_no_strategy(monkeypatch):
    """每種策略用同一份文字：以前每種各讀一次，訓練到一半改了 README，損失就差了百分之一。"""
    texts = iter(np.arange(40_000, dtype=np.int32).reshape(2, -1) % 7 * np.array([[1], [9]], np.int32))
    monkeypatch.setattr(demo, "read_text", lambda: np.split(next(texts), [18_000]))
    results = demo.train(small_config(strategies=("data",), num_kv_heads=8), progress=False)
    np.testing.assert_allclose(results["data"].losses, results["single"].losses, rtol=demo.TARGET_DIFFERENCE)


def test_two_processes_find_the_losses_of_one(tmp_path):
    """兩個行程各有四個假裝置，經由 loopback 合成一張 4x2 的 Mesh；對照是這個行程的八個假裝置。"""
    config = small_config(num_kv_heads=8, strategies=("data_model",), steps=2)
    numbers = [field.name for field in dataclasses.fields(config) if hasattr(field.type, "__metadata__")]
    flags = [f"--{name.replace('_', '-')}={getattr(config, name)}" for name in numbers if "process" not in name]
    command = [sys.executable, str(script("5_Sharding_Demo")), *flags, "--coordinator", f"127.0.0.1:{free_port()}"]
    command += ["--num-processes", "2", "--strategies", "data_model"]
    processes = [
        subprocess.Popen(
            [*command, "--process-id", str(i), "--out-dir", f"out{i}"],
            cwd=tmp_path, env=short_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        alone = demo.train(config, progress=False)
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0].splitlines()[-1] == "結果存在 out0"
    assert "達標" not in outputs[1][0]
    assert not (tmp_path / "out1").exists()
    together = metrics(tmp_path / "out0")
    assert together["device"]["count"] == 8
    for name, result in alone.items():
        row = together["strategies"][name]
        np.testing.assert_allclose(row["losses"], result.losses, rtol=1e-5)
        assert row["bytes"] == result.bytes
        assert row["test_loss"] == pytest.approx(result.test_loss, rel=1e-5)


def test_default_run_reaches_the_target(tmp_path):
    result = run("5_Sharding_Demo", "--out-dir out", tmp_path, environment())
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2].startswith("達標：5 種策略")
    recorded = metrics(tmp_path / "out")
    assert list(recorded["strategies"]) == STRATEGIES
    prompt, before, after = recorded["samples"].values()
    assert before != after
    assert f"提示：{prompt}\n" in result.stdout
    assert f"訓練之前：{before}\n" in result.stdout
    assert f"訓練之後：{after}\n" in result.stdout
    for row in recorded["strategies"].values():
        reference = recorded["strategies"]["single"]["losses"]
        assert len(row["losses"]) == 20
        np.testing.assert_allclose(row["losses"], reference, rtol=1e-4)
        assert row["max_relative_difference"] <= recorded["max_relative_difference"] <= 1e-4
        assert row["losses"][-1] < row["losses"][0] - 1  # 真的學到東西
        assert row["test_loss"] == pytest.approx(recorded["strategies"]["single"]["test_loss"], rel=1e-4)
    names = itertools.product(["placement", "collectives"], STRATEGIES[1:])
    files = {f"{kind}_{name}.{'png' if kind == 'placement' else 'txt'}" for kind, name in names}
    files |= {"collectives_single.txt", "learning_curve.png", "bytes_and_collectives.png", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files

    # README 引用的編譯結果與表格，就是這次跑出來的
    text = README.read_text(encoding="utf-8")
    program = (tmp_path / "out" / "collectives_data_model.txt").read_text(encoding="utf-8").splitlines()
    excerpt = re.search(r"```text\n(%.*?)```", text, re.DOTALL)[1].splitlines()
    assert len(excerpt) >= 2
    for line in excerpt:
        assert any(all(part in full for part in line.split(" … ")) for full in program), line
    table = re.search(r"\| 權重 \| 邏輯軸 .*?\n\n", text, re.DOTALL)[0].strip().splitlines()
    assert len(table) == 2 + len(demo.WEIGHTS)
    shown = result.stdout.split("data_model：Mesh")[1].splitlines()
    assert set(table) <= set(shown)
