"""The rules of threads, with the MLX that is installed, and the thread that keeps them."""

from __future__ import annotations

import asyncio
import threading

import mlx.core as mx
import pytest

import mlx_delta
from mlx_delta import DeltaConfig
from mlx_delta.cache import DeltaKVCache
from mlx_delta.chat import Conversation, ModelThread, Options
from mlx_delta.generate import make_caches
from tests.tiny import SMALL


def elsewhere(function):
    """What a function returns on a thread that has ended since."""
    with ModelThread() as thread:
        return thread.run(function)


def text(loaded, caches=None, tokens=5) -> str:
    model, tokenizer = loaded
    options = {} if caches is None else {"prompt_cache": caches}
    return mlx_delta.generate(model, tokenizer, "Hello", max_tokens=tokens, **options)


def test_an_array_that_is_not_evaluated_stays_with_its_thread():
    with pytest.raises(RuntimeError, match="There is no Stream"):
        mx.eval(elsewhere(lambda: mx.arange(4) * 2 + 1))


def test_an_evaluated_array_crosses():
    def make():
        array = mx.arange(4) * 2 + 1
        mx.eval(array)
        return array

    assert (elsewhere(make) + 1).tolist() == [2, 4, 6, 8]


def test_a_loaded_model_crosses_and_a_lazy_one_does_not(template_path):
    loaded = elsewhere(lambda: mlx_delta.load(template_path, SMALL))
    assert text(loaded) == elsewhere(lambda: text(loaded))
    lazy = elsewhere(lambda: mlx_delta.load(template_path, SMALL, lazy=True))
    with pytest.raises(RuntimeError, match="There is no Stream"):
        text(lazy)


def test_caches_of_an_answer_that_has_ended_cross(default):
    def begin():
        caches = make_caches(default[0])
        text(default, caches)
        return caches

    assert text(default, elsewhere(begin)) == text(default, begin())


@pytest.mark.parametrize("close", [False, True], ids=["ended", "closed"])
@pytest.mark.parametrize(
    "setting",
    ["", "level=0.03", "key_format=codes,key_bits=4,value_bits=4", "level=0.03,key_bits=4"],
    ids=["thresholds", "full", "codes", "deltas"],
)
def test_caches_of_many_blocks_cross_at_every_turn(default, setting, close):
    model, tokenizer = default
    config = DeltaConfig.parse(setting, SMALL)
    caches = [DeltaKVCache(config.for_layer(i, 3)) for i in range(3)]

    def turn(prompt):
        answer = mlx_delta.stream_generate(
            model, tokenizer, prompt, max_tokens=9, prompt_cache=caches
        )
        if close:
            next(answer)
            answer.close()
        else:
            list(answer)

    for first, length in ((0, 41), (41, 15), (56, 1), (57, 40)):
        elsewhere(lambda a=first, n=length: turn(list(range(a, a + n))))
    assert caches[0].offset >= 97


def test_seeds_are_of_the_thread_that_draws():
    mx.random.seed(1)
    own = mx.random.uniform().item()
    mx.random.seed(1)
    assert elsewhere(lambda: mx.random.uniform().item()) != own


def test_a_conversation_on_a_thread_of_its_own(template_path):
    def begin() -> Conversation:
        loaded = mlx_delta.load(template_path, SMALL)
        return Conversation(*loaded, options=Options(max_tokens=12))

    wanted = "".join(begin().ask("Hello"))
    with ModelThread() as thread:
        conversation = thread.run(begin)
        pieces: list[str] = []
        assert thread.stream(lambda: conversation.ask("Hello"), pieces.append).done.result()
        assert "".join(pieces) == wanted


def test_a_cancelled_stream_ends_on_the_models_thread(default):
    closed = []

    def count():
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    with ModelThread() as thread:
        begun, seen = threading.Event(), []
        streaming = thread.stream(count, lambda i: (seen.append(i), begun.set(), begun.wait(5)))
        begun.wait(5)
        streaming.cancel()
        streaming.done.result(5)
        never = thread.stream(count, seen.append)
        never.cancel()
        never.done.result(5)
    assert closed[0] == "model" and seen[0] == 0


def test_an_error_comes_out_where_the_result_is_asked_for():
    with ModelThread() as thread:
        with pytest.raises(ZeroDivisionError):
            thread.run(lambda: 1 // 0)
        assert thread.run(lambda: 7) == 7  # it goes on
    with pytest.raises(RuntimeError, match="it was closed"):
        thread.submit(lambda: 7)


def test_an_event_loop_stays_free_while_a_model_answers(template_path):
    def begin() -> Conversation:
        loaded = mlx_delta.load(template_path, SMALL)
        return Conversation(*loaded, options=Options(max_tokens=12))

    async def main() -> tuple[str, int]:
        loop, pieces, ticks = asyncio.get_running_loop(), asyncio.Queue(), 0
        with ModelThread() as thread:
            conversation = await asyncio.wrap_future(thread.submit(begin))

            def hand_on(piece):
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

            streaming = thread.stream(lambda: conversation.ask("Hello"), hand_on)
            done = asyncio.wrap_future(streaming.done)
            while not done.done():
                ticks += 1
                await asyncio.sleep(0.001)
            await asyncio.sleep(0)
        return "".join(pieces.get_nowait() for _ in range(pieces.qsize())), ticks

    answer, ticks = asyncio.run(main())
    assert answer and ticks > 1
