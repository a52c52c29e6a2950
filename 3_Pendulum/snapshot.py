"""把模組這一刻的權重拍成快照：編譯過、只收輸入的函式。第 2、3 課的這個檔案相同。"""

import functools

import jax


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(function, structure, weights, *inputs):
    return function(jax.tree.unflatten(structure, weights), *inputs)


def snapshot(function, module):
    """function(module, *輸入) 編譯成只收輸入的函式；用的是這一刻的權重，之後再學也不變。

    模組每次進 jax.jit 都要攤平；這裡只攤平一次，每一步快好幾倍。
    """
    weights, structure = jax.tree.flatten(module)
    return functools.partial(call, function, structure, weights)
