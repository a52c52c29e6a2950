"""每一課共用的外圍：命令列、Ctrl-C、結果。每個資料夾裡的這個檔案一個位元組都不差；學演算法不必讀它。"""

import atexit  # 匯入得越少，Ctrl-C 越早有人接：其餘的套件用到才匯入
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings

PACKAGES = ("numpy", "jax", "flax", "optax", "gymnasium", "tensorflow_probability", "tensorflow_datasets", "matplotlib")
NOTEBOOK = "IPython" in sys.modules


class LessonError(Exception):
    """跑不下去：LessonError("哪裡不對；怎樣才對", 結束狀態)。2 是使用者給的東西不對，1 是跑到一半的事。"""


class Run:
    """一次執行：什麼時候開始、該不該停 (stop)、怎麼收場。只有直接執行的腳本才接管 Ctrl-C 與 SIGTERM。"""

    def __init__(self, name: str, script: str):
        self.started, self.stop, self.handlers = time.perf_counter(), threading.Event(), {}
        if name == "__main__" and threading.current_thread() is threading.main_thread():
            self.handlers = {n: signal.signal(n, self.interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
        if name == "__main__" and not NOTEBOOK:
            gc.set_threshold(100_000)  # 匯入與追蹤程式 (tracing) 造出的幾十萬個物件都不是垃圾，不必一再檢查
            sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
            sys.stdout.reconfigure(errors="replace")  # 印不出中文的終端機看到問號
            os.environ["MPLBACKEND"] = "agg"  # 從筆記本用 ! 執行時，這裡指著筆記本才有的後端
            logging.getLogger("matplotlib").setLevel(logging.ERROR)  # 家目錄寫不進去，它自己另找地方放快取
            if os.access(folder := os.path.dirname(os.path.realpath(script)), os.W_OK):  # 編譯過的留到下一次
                os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(folder, ".jax_cache"))
                os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # 就重新編譯

    def interrupt(self, *which) -> None:
        """第一次只設旗標：例外可能被別人的 except 吞掉，旗標不會。第二次立刻結束。"""
        if self.stop.is_set():
            return signal.default_int_handler(*which) if NOTEBOOK else os._exit(130)  # 筆記本的核心要活著
        self.stop.set()
        with contextlib.suppress(OSError, ValueError):  # 不用 print：主程式可能正印到一半
            os.write(sys.stderr.fileno(), "\n停止中；再按一次 Ctrl-C 立刻結束\n".encode(sys.stderr.encoding, "replace"))

    def __call__(self, main) -> None:
        """執行 main；跑不下去印一行，不印 traceback；最後把 Ctrl-C 還回去。"""
        NOTEBOOK or gc.freeze()  # 匯入的東西以後都不檢查；筆記本的核心要一直活著，所以不做
        try:
            self.require_learnt(False)  # 匯入套件的時候就按了 Ctrl-C
            main()
        except LessonError as error:
            print(f"錯誤：{error.args[0]}", file=sys.stderr)
            sys.exit(error.args[1])
        except BrokenPipeError:  # 看的人先走了 (| head)；結果在印之前就存好了
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(130 if self.stop.is_set() else 0)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)
                atexit.register(signal.signal, number, signal.SIG_IGN)  # Python 收攤的時候按，事情已經做完了

    def require_learnt(self, learnt) -> None:
        """被中斷時什麼都還沒學到，就什麼都不寫：以前的結果還在。"""
        if self.stop.is_set() and not learnt:
            print("已中斷：還沒有學到東西，沒有寫任何檔案", flush=True)
            sys.exit(130)

    def save_metrics(self, config, train_seconds: float, **results) -> None:
        """metrics.json；versions 只記這一課匯入了的套件。"""
        jax, versions = sys.modules.get("jax"), {"python": sys.version.split()[0]}
        versions |= {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
        seconds = {"train": train_seconds, "total": time.perf_counter() - self.started}
        device = {"platform": jax.default_backend() if jax else "cpu", "count": jax.device_count() if jax else 1}
        metrics = {"lesson": type(config).out_dir.parent.name, "seed": config.seed, "config": vars(config)}
        metrics |= {"seconds": seconds, "device": device, "versions": versions} | results
        with contextlib.suppress(ValueError):  # 最後一次更新才發散，損失還來不及變成 NaN
            text = json.dumps(metrics, ensure_ascii=False, indent=2, default=os.fspath, allow_nan=False)
            return save(config.out_dir / "metrics.json", text.encode(errors="backslashreplace"))
        raise LessonError("結果不是有限的數；把學習率調小再試", 1)

    def finish(self, config, undone: str = "") -> None:
        """最後一行：結果在哪裡。還有事沒做完才給 undone (做到哪裡)，結束狀態是 130。"""
        print(f"已中斷：{undone}，目前的" if undone else "", f"結果存在 {config.out_dir}", sep="", flush=True)
        if undone:
            sys.exit(130)


def check_bounds(config) -> None:
    """型別 Annotated[float, (0, 1)] 寫著下限與上限，含兩端；不在裡面就丟出 ValueError，tyro 會印出來。"""
    for name, annotation in type(config).__annotations__.items():
        for low, high in getattr(annotation, "__metadata__", ()):
            if not low <= (value := getattr(config, name)) <= high:  # nan 不在任何範圍裡
                raise ValueError(f"--{name.replace('_', '-')} 是 {value}；要在 {low:,} 與 {high:,} 之間")


def parse(config_class, description: str):
    """命令列 → config_class；錯的值由 tyro 說明，以狀態 2 結束。這時只看 out_dir 寫不寫得進去，還不建立它。"""
    import tyro

    config = tyro.cli(config_class, description=description)
    with contextlib.suppress(OSError):  # 名字太長，或工作目錄被刪了，也是寫不進去
        metrics = config.out_dir.absolute() / "metrics.json"
        place = next(p for p in metrics.parents if p.is_symlink() or p.exists())
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and not metrics.is_dir():
            return config
    raise LessonError(f"--out-dir {config.out_dir} 寫不進去；要是可以寫入的資料夾", 2)


def find_devices() -> list:
    """JAX 用得到的裝置；JAX_PLATFORMS 指定的這裡沒有，就說怎麼改。"""
    with contextlib.suppress(RuntimeError, AssertionError):
        return sys.modules["jax"].devices()
    wrong = f"JAX 在這台機器上用不了 JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', 'cpu')}"
    raise LessonError(f"{wrong}；設 JAX_PLATFORMS=cpu，或照 README.md 的「安裝」換 JAX 的版本", 2)


def save(path, data: bytes) -> None:
    """先寫在旁邊，寫完才改名：磁碟滿了、被打斷，都不會留下半個檔案；同時跑兩個也不互撞。"""
    aside = path.with_name(f".{os.urandom(4).hex()}-{path.name}")  # 容器裡的行程編號都是 1，分不開
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise LessonError(f"{path} 寫不進去 ({error.strerror})；清出空間，或換一個 --out-dir", 1) from error
