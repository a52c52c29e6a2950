"""第 5 課的模型：一個小小的 Llama。它只說每個維度叫什麼名字 (邏輯軸)，不知道有幾個裝置，也不知道怎麼切。

出處：Llama 3：Grattafiori 等 (2024)，arXiv 2407.21783，表 3。旋轉位置編碼 (RoPE)：Su 等 (2021)，arXiv 2104.09864，
第 3.4.2 節。SwiGLU：Shazeer (2020)，arXiv 2002.05202，式 (6)。GQA：Ainslie 等 (2023)，arXiv 2305.13245。
"""

import math
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.core.spmd import get_pspec

# 每一個權重的每一個維度叫什麼名字。所有層的權重疊成一個陣列，第一個維度是層。
WEIGHTS = {
    "embedding": ("vocab", "embed"),
    "attention_norm": ("layers", "embed"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "key": ("layers", "embed", "kv_heads", "head_dim"),
    "value": ("layers", "embed", "kv_heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "mlp_norm": ("layers", "embed"),
    "gate": ("layers", "embed", "mlp"),
    "up": ("layers", "embed", "mlp"),
    "down": ("layers", "mlp", "embed"),
    "final_norm": ("embed",),
    "lm_head": ("embed", "vocab"),
}
# 中間結果的名字；寫 None 的維度永遠不切。殘差流的寬度就是這樣：embed 這條規則只管權重。
ACTIVATIONS = {
    "tokens": ("batch", "sequence"),
    "residual": ("batch", "sequence", None),
    "heads": ("batch", None, "heads", None),
    "kv_heads": ("batch", None, "kv_heads", None),
    "hidden": ("batch", None, "mlp"),
    "logits": ("batch", None, "vocab"),
}
AXES = tuple(dict.fromkeys(axis for axes in [*WEIGHTS.values(), *ACTIVATIONS.values()] for axis in axes if axis))


@dataclass(frozen=True)
class Llama:
    """一個 Llama 的形狀；欄位的名字就是邏輯軸的名字。"""

    vocab: int
    embed: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    dtype: str = "float32"
    remat: bool = False  # 反向傳播時重算每一層，而不是存下來；同時把各層收進一個迴圈，編譯得快


LLAMAS = {
    "llama3-8b": Llama(128256, 4096, 14336, 32, 8, 128, 32, "bfloat16", remat=True),
    "llama3-70b": Llama(128256, 8192, 28672, 64, 8, 128, 80, "bfloat16", remat=True),
}
PUBLISHED_PARAMETERS = {"llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496}


def axis_sizes(llama: Llama, batch_size: int, sequence_length: int) -> dict[str, int]:
    """每個邏輯軸多長。"""
    sizes = asdict(llama) | {"batch": batch_size, "sequence": sequence_length}
    return {axis: sizes[axis] for axis in AXES}


def count_parameters(llama: Llama) -> int:
    sizes = asdict(llama)
    return sum(math.prod(sizes[axis] for axis in axes) for axes in WEIGHTS.values())


def count_activations(llama: Llama, batch_size: int, sequence_length: int) -> int:
    """反向傳播前要存的中間結果大約有幾個數：一層的殘差流、MLP、注意力矩陣各幾份，加上 logits；只算數量級。"""
    per_token = 8 * llama.embed + 4 * llama.mlp + 3 * llama.heads * sequence_length
    return batch_size * sequence_length * (llama.layers * per_token + 4 * llama.vocab)


def constrain(x: jax.Array, name: str) -> jax.Array:
    """告訴編譯器這個中間結果要怎麼切；其餘的由它推論。get_pspec 是 Flax 自己的 translate，查現在的規則手冊。"""
    return jax.lax.with_sharding_constraint(x, get_pspec(ACTIVATIONS[name]))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotary(x: jax.Array) -> jax.Array:
    """旋轉位置編碼 (RoPE)：(batch, sequence, heads, head_dim)，前半與後半成對旋轉，角度與位置成正比。"""
    half = x.shape[-1] // 2
    angles = jnp.outer(jnp.arange(x.shape[1]), 500_000.0 ** (-jnp.arange(half) / half))[:, None, :]
    # 擋住融合 (fusion)：不然用到的每個地方都重算一次 cos 與 sin，一步慢兩成
    cos, sin = jax.lax.optimization_barrier((jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nnx.Module):
    """一層 Transformer。建立時權重有 layers 維度 (所有層疊在一起)，呼叫時已經切成一層。"""

    def __init__(self, make):
        self.attention_norm, self.mlp_norm = make("attention_norm"), make("mlp_norm")
        self.query, self.key, self.value, self.out = make("query"), make("key"), make("value"), make("out")
        self.gate, self.up, self.down = make("gate"), make("up"), make("down")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + constrain(self.attention(rms_norm(x, self.attention_norm[...])), "residual")
        return x + constrain(self.mlp(rms_norm(x, self.mlp_norm[...])), "residual")

    def attention(self, x: jax.Array) -> jax.Array:
        """因果注意力：只看得到自己與前面的位置；一個鍵值頭由一組注意力頭共用 (GQA)。"""
        query = rotary(constrain(jnp.einsum("bse,ehd->bshd", x, self.query[...]), "heads"))
        key = rotary(constrain(jnp.einsum("bse,ehd->bshd", x, self.key[...]), "kv_heads"))
        value = constrain(jnp.einsum("bse,ehd->bshd", x, self.value[...]), "kv_heads")
        heads = constrain(jax.nn.dot_product_attention(query, key, value, is_causal=True), "heads")
        return jnp.einsum("bshd,hde->bse", heads, self.out[...])

    def mlp(self, x: jax.Array) -> jax.Array:
        """有閘門的 MLP (SwiGLU)：第一個矩陣切行、第二個矩陣切列，中間不必通訊。"""
        hidden = constrain(jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...]), "hidden")
        return hidden @ self.down[...]


class Transformer(nnx.Module):
    """只有解碼器的語言模型：詞元 (batch, sequence) → logits (batch, sequence, vocab)。"""

    def __init__(self, llama: Llama, rngs: nnx.Rngs):
        sizes = asdict(llama)

        def make(name: str) -> nnx.Param:
            axes = WEIGHTS[name]
            shape = tuple(sizes[axis] for axis in axes)
            if name.endswith("norm"):
                return nnx.Param(jnp.ones(shape, llama.dtype), out_sharding=axes)
            fan_in = llama.mlp if name == "down" else llama.embed
            bound = math.sqrt(3 / fan_in)  # 變異數 1 / fan_in 的均勻分佈；編譯起來比常態快
            values = jax.random.uniform(rngs.params(), shape, llama.dtype, -bound, bound)
            return nnx.Param(values, out_sharding=axes)

        self.embedding, self.final_norm, self.lm_head = make("embedding"), make("final_norm"), make("lm_head")
        self.blocks = Block(make)
        self.remat = llama.remat

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = constrain(self.embedding[...][tokens], "residual")
        graphdef, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(graphdef, layer)(x), None

        # 攤開迴圈 (unroll)：編譯出來的程式裡，每一次通訊都看得見、數得到
        x, _ = jax.lax.scan(jax.checkpoint(block) if self.remat else block, x, layers, unroll=not self.remat)
        return constrain(rms_norm(x, self.final_norm[...]) @ self.lm_head[...], "logits")


def cross_entropy(model: Transformer, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """平均一個詞元的損失，單位是 nat。"""
    logits = model(inputs).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def create(llama: Llama, learning_rate: float, seed: int | jax.Array) -> tuple[Transformer, nnx.Optimizer]:
    # rbg 編譯得快；怎麼切，抽到的數字都一樣。每個裝置都先抽完一整個權重，再留下自己那一塊：大模型用預設的 threefry
    model = Transformer(llama, nnx.Rngs(jax.random.key(seed, impl="rbg")))
    return model, nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)
