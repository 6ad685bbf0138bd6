"""The thread that computes: all requests in one batch, of which any can end at any step.

mlx-lm's ``BatchGenerator`` does the work. Its server's own loop around it looks for new requests
and for clients that went away twice a second, empties the batch for a request with a seed, and
ends with the first error; so this one takes that loop's place.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, StopSequences
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    ModelProvider,
    Response,
    ResponseGenerator,
)

from mlx_delta.system.thread_end import cleared_with_thread

from .alone import serve_alone
from .job import Job, Request
from .refusal import NO_MEMORY, Refused
from .room import LOOK_EVERY, check_prompt, is_short_of_memory
from .sampling import choose_processors, choose_sampler, probabilities
from .served import Served
from .store import Prefixes, cut_known

_log = logging.getLogger(__name__)
_FIRST_WORD = 10.0  # seconds that a request may wait for its turn before its answer is begun


class Engine(ResponseGenerator):
    """mlx-lm's response generator, whose thread runs until :meth:`stop_and_join`.

    Args:
        model_provider: mlx-lm's, or this library's.
        prompt_cache: The store of caches: mlx-lm's ``LRUPromptCache``, or one with its methods.
        served: The model and the limits.
    """

    model_provider: Any  # before a model is loaded it has none

    def __init__(
        self, model_provider: ModelProvider, prompt_cache: Any, served: Served | None = None
    ):
        self.served = served or Served()
        self.prefixes = Prefixes(prompt_cache)
        self._cutting = threading.Lock()  # a tokenizer is for one thread at a time
        self._counting = threading.Lock()
        self._open = 0
        self._turns = 0
        self._closing = False
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._batch: BatchGenerator | None = None
        super().__init__(model_provider, prompt_cache)

    # Any thread.

    def generate(
        self,
        request: CompletionRequest,
        generation_args: GenerationArguments,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Admit a request; returns what mlx-lm's handler needs of it, and its answer's pieces.

        Raises:
            Refused: There are too many, or the prompt can't be served.
        """
        if not self.generation_available():
            raise RuntimeError("generation thread died")
        job = self._make_job(request, generation_args)
        if isinstance(request, Request):
            request.job = job
        self.requests.put(job)
        job.wait(_FIRST_WORD, self.generation_available)
        return job.context, job.pieces(progress_callback, self.generation_available)

    def admit(self) -> None:
        """Count a request in, before its body is looked at; :meth:`leave` counts it out.

        Raises:
            Refused: As many as can be worked on and may wait are here, or the server ends.
        """
        most = self.rows + self.served.max_queue
        with self._counting:
            if self._closing:
                raise Refused(503, "The server is shutting down.", headers={"Retry-After": "10"})
            if self._open >= most:
                raise Refused(
                    429,
                    f"The server has {self._open} requests already; try again later.",
                    code="queue_full",
                    headers={"Retry-After": "5"},
                )
            self._open += 1

    def leave(self) -> None:
        """Count a request out."""
        with self._counting:
            self._open -= 1

    @property
    def rows(self) -> int:
        """Requests that are worked on at one time."""
        return int(self.cli_args.decode_concurrency) if self._is_batchable(None) else 1

    def figures(self) -> dict[str, Any]:
        """What is going on: requests, and bytes of caches and memory."""
        return {
            "requests": self._open,
            "running": len(self._running),
            "cached_prompts": len(self.prefixes),
            "cached_bytes": self.prefixes.nbytes,
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }

    @property
    def is_closing(self) -> bool:
        """Whether nothing is admitted any more."""
        return self._closing

    def drain(self, seconds: float) -> bool:
        """Admit nothing any more, and wait for what is on its way; returns whether it is done."""
        with self._counting:
            self._closing = True
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end and self.generation_available():
            time.sleep(0.05)
        return not self._open

    def stop_and_join(self) -> None:
        """End the thread; answers that are not finished end with an error."""
        self._stop = True
        self.requests.put(None)  # it may sleep
        self._generation_thread.join()

    def _make_job(self, request: CompletionRequest, args: GenerationArguments) -> Job:
        """Cut the prompt into tokens, and see whether it can be answered.

        Raises:
            Refused: It can't.
        """
        served = self.served
        try:
            with self._cutting:
                prompt, segments, kinds, state, _ = self._tokenize(
                    self.model_provider.tokenizer, request, args
                )
                _, machine = self._machines()
        except Exception as error:  # a chat template is a program, and raises what it likes
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            raise Refused(
                400,
                f"The model's chat template refuses these messages: {reason}."
                if request.request_type == "chat"
                else f"The prompt can't be cut into tokens: {reason}.",
                param="messages" if request.request_type == "chat" else "prompt",
            ) from error
        check_prompt(prompt, served, self.model_provider)
        args.max_tokens = served.room(len(prompt), args.max_tokens)
        tokenizer = self.model_provider.tokenizer
        context = GenerationContext(
            has_tool_calling=tokenizer.has_tool_calling,
            has_thinking=tokenizer.has_thinking,
            tool_parser=tokenizer.tool_parser,
            text_sm=machine,
            initial_state=state,
            prompt=prompt,
        )
        job = Job(request, args, context, segments, kinds, tokenizer.tool_parser)
        context.tool_parser = job.read_call
        return job

    def _tokenize(
        self, tokenizer: Any, request: CompletionRequest, args: GenerationArguments
    ) -> tuple[list[int], list[list[int]], list[str], str, Any]:
        """As mlx-lm's; a text may be token ids, and brings no second BOS."""
        if request.request_type == "chat":
            return super()._tokenize(tokenizer, request, args)
        prompt: Any = request.prompt
        if isinstance(prompt, str):
            bos = tokenizer.bos_token
            prompt = tokenizer.encode(
                prompt, add_special_tokens=bos is None or not prompt.startswith(bos)
            )
        return list(prompt), [list(prompt)], ["assistant"], "normal", None

    def _is_batchable(self, args: Any) -> bool:
        """Whether requests share a batch; a seed does not matter."""
        provider = self.model_provider
        return bool(
            provider.is_batchable and provider.draft_model is None and self.cli_args.kv_bits is None
        )

    def _machines(self) -> tuple[StopSequences, Any]:
        """mlx-lm's automata: of the tokens that end an answer, and of the marks within one."""
        provider = self.model_provider
        return self._make_state_machine(provider.model_key, provider.tokenizer, [])

    # The engine's thread.

    def _run_generate(self) -> None:
        cleared_with_thread()
        super()._run_generate()

    def _generate(self) -> None:
        self.model_provider.load_default()
        try:
            while not self._stop:
                self._take(sleep=not self._waiting and not self._running)
                try:
                    self._turn()
                except Exception as error:  # nothing is known of the batch then: its rows end
                    _log.exception("a step failed; its %d requests end", len(self._running))
                    for job in self._running.values():
                        job.fail(error)
                    self._drop_batch()
        finally:
            self._end()

    def _take(self, sleep: bool) -> None:
        """Take over what the connections' threads have put down; sleep until there is something."""
        if sleep:
            mx.clear_cache()
            job = self.requests.get()
            self._waiting.extend([job] if job is not None else [])
        while not self.requests.empty():
            job = self.requests.get()
            self._waiting.extend([job] if job is not None else [])

    def _turn(self) -> None:
        """Let go of who went away, let in who waits, and make a step."""
        self._drop_gone()
        while self._waiting and len(self._running) < self.rows:
            self._start(self._waiting.popleft())
        self._turns += 1
        if self._running and self._turns % LOOK_EVERY == 0 and is_short_of_memory(self.prefixes):
            self._give_up_newest()
        if self._running:
            self._step()

    def _give_up_newest(self) -> None:
        """End the answer that was begun last, so that the others can go on."""
        assert self._batch is not None
        uid, job = self._running.popitem()
        self._batch.remove([uid])
        mx.clear_cache()
        job.fail(Refused(503, "The server is out of memory; try again later.", code=NO_MEMORY))

    def _drop_gone(self) -> None:
        """Free the rows of clients that went away."""
        gone = [uid for uid, job in self._running.items() if job.is_gone]
        if gone and self._batch is not None:
            self._batch.remove(gone)
            for uid in gone:
                self._running.pop(uid).leave()
        for job in [job for job in self._waiting if job.is_gone]:
            self._waiting.remove(job)
            job.leave()

    def _start(self, job: Job) -> None:
        """Put a job into the batch, or work on it by itself."""
        try:
            if self._is_batchable(job.args):
                self._insert(job)
            else:
                serve_alone(job, self.model_provider, self.prefixes, lambda: self._stop)
        except Exception as error:
            _log.exception("a request failed")
            job.fail(error)

    def _insert(self, job: Job) -> None:
        provider, prompt = self.model_provider, job.context.prompt
        caches, known = self.prefixes.find(provider.model_key, prompt)
        segments, kinds = cut_known(job.segments, job.kinds, known)
        if self._batch is None:
            self._batch = BatchGenerator(
                provider.model,
                completion_batch_size=self.cli_args.decode_concurrency,
                prefill_batch_size=self.cli_args.prompt_concurrency,
                prefill_step_size=self.cli_args.prefill_step_size,
                stream=mx.default_stream(mx.default_device()),
            )
        job.kinds = kinds[::-1]
        job.start(provider.tokenizer.detokenizer, known)
        (uid,) = self._batch.insert_segments(
            segments=[segments],
            max_tokens=[job.args.max_tokens],
            caches=None if caches is None else [caches],
            all_tokens=[prompt[:known]],
            samplers=[choose_sampler(job.args, provider.tokenizer)],
            logits_processors=[choose_processors(job.args)],
            stop_sequences=[self._machines()[0]],
        )
        self._running[uid] = job

    def _step(self) -> None:
        """A token for every row, a piece of the prompts of others."""
        assert self._batch is not None
        prompts, tokens = self._batch.next()
        self._keep_segments(prompts)
        for response in tokens:
            self._hand_on(response)

    def _keep_segments(self, responses: list[Any]) -> None:
        """Report progress, and keep the caches of prompts' begins that others may share."""
        ended = []
        for response in responses:
            job = self._running[response.uid]
            job.progress(*response.progress)
            if response.end_of_segment and not response.end_of_prompt and job.kinds:
                ended.append(response.uid)
        assert self._batch is not None
        for uid, (caches, tokens) in self._batch.extract_cache(ended).items():
            kind = self._running[uid].kinds.pop()
            self.prefixes.keep(self.model_provider.model_key, tokens, [caches], kind)

    def _hand_on(self, response: Any) -> None:
        """Hand a token on to its client, and keep the caches of an answer that has ended."""
        job, reason = self._running[response.uid], response.finish_reason
        caches, tokens = response.prompt_cache, response.all_tokens
        shown, ended = job.shown(job.text_of(response.token, reason), reason)
        if reason is None and ended is not None:
            # At a stop word, of which the batch knows nothing.
            assert self._batch is not None
            found = self._batch.remove([response.uid], return_prompt_caches=True)
            caches, tokens = found[response.uid]
        if ended is not None:
            del self._running[response.uid]
            self.prefixes.keep(self.model_provider.model_key, tokens, [caches])
        chances = probabilities(job.args, response.token, response.logprobs)
        job.say(shown, response.token, ended, *chances)

    def _drop_batch(self) -> None:
        self._running.clear()
        if self._batch is not None:
            self._batch.close()
        self._batch = None
        gc.collect()
        mx.clear_cache()

    def _end(self) -> None:
        """Tell those who wait, and let go of the arrays in the thread that made them."""
        self._take(sleep=False)
        ending = Refused(503, "The server is shutting down.")
        for job in [*self._running.values(), *self._waiting]:
            job.fail(ending)
        self._waiting.clear()
        self.model_provider.reset()
        self.prefixes.close()
        del self.prompt_cache
        self._drop_batch()
