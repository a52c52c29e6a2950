"""第 6 課的模型：只有解碼器的 Transformer，用 Flax 自己的零件；每個權重旁邊寫著它的邏輯軸。"""

import jax
import jax.numpy as jnp
from axis_rules import constrain
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from task import ANSWER_LENGTH, PROMPT_LENGTH, VOCAB


def axes(*names: str | None) -> dict:
    return {"out_sharding": names}


class Block(nnx.Module):
    """一層：注意力與 MLP，各加回殘差流。"""

    def __init__(self, config, rngs: nnx.Rngs):
        embed, mlp = config.embed_dim, config.mlp_dim
        self.attention_norm = nnx.RMSNorm(embed, scale_metadata=axes("embed"), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.num_heads, embed, use_bias=False, keep_rngs=False, rngs=rngs,
            kernel_metadata=axes("embed", "heads", "head_dim"), out_kernel_metadata=axes("heads", "head_dim", "embed"),
        )  # fmt: skip
        self.mlp_norm = nnx.RMSNorm(embed, scale_metadata=axes("embed"), rngs=rngs)
        self.fc1 = nnx.Linear(embed, mlp, use_bias=False, kernel_metadata=axes("embed", "mlp"), rngs=rngs)
        self.fc2 = nnx.Linear(mlp, embed, use_bias=False, kernel_metadata=axes("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, decode: bool) -> jax.Array:
        x = constrain(x + self.attention(self.attention_norm(x), decode=decode, is_causal=not decode), "residual")
        return constrain(x + self.fc2(nnx.gelu(self.fc1(self.mlp_norm(x)))), "residual")


class Transformer(nnx.Module):
    """詞元 (N, 長度) → 每個位置的 outputs 個數：演員是下一個詞元的 logits，評論家是一個價值。"""

    def __init__(self, config, rngs: nnx.Rngs, outputs: int = VOCAB):
        embed, length = config.embed_dim, PROMPT_LENGTH + ANSWER_LENGTH
        self.embed = nnx.Embed(VOCAB, embed, embedding_metadata=axes("vocab", "embed"), rngs=rngs)
        self.positions = nnx.Embed(length, embed, embedding_metadata=axes("position", "embed"), rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(embed, scale_metadata=axes("embed"), rngs=rngs)
        last = axes("embed", "vocab" if outputs == VOCAB else None)
        self.fc_out = nnx.Linear(embed, outputs, use_bias=False, kernel_metadata=last, rngs=rngs)
        self.rules = nnx.static(get_logical_axis_rules())  # 換一本規則手冊，用到它的函式就會重新編譯

    def __call__(self, tokens: jax.Array, first: int | jax.Array = 0, decode: bool = False) -> jax.Array:
        """tokens 的第一個在位置 first；decode 時一次一個詞元，前面的鍵與值在 KV 快取裡。"""
        x = self.embed(tokens) + self.positions(first + jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(constrain(x, "residual"), decode)
        return self.fc_out(self.norm(x))

    def init_cache(self, rows: int) -> None:
        for block in self.blocks:
            block.attention.init_cache((rows, *self.positions.embedding.shape))


def answer_outputs(model: Transformer, tokens: jax.Array) -> jax.Array:
    """寫每一個答案詞元之前的輸出：(N, 提示 + 答案) → (N, 答案的長度, outputs)。"""
    return model(tokens[:, :-1])[:, PROMPT_LENGTH - 1 :]


def answer_log_probs(actor: Transformer, tokens: jax.Array) -> jax.Array:
    """log π(詞元 | 前面的詞元)，形狀 (N, 答案的長度)。"""
    log_probs = jax.nn.log_softmax(answer_outputs(actor, tokens))
    return jnp.take_along_axis(log_probs, tokens[:, PROMPT_LENGTH:, None], axis=2)[..., 0]
