"""vLLM for groups of different sizes."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count, groupby
from types import MappingProxyType

import numpy as np
import requests
import torch
from accelerate.utils import broadcast_object_list
from trl.generation.vllm_generation import VLLMGeneration

from ..runs.lifecycle import RunCannotGoOn
from .adapter_sync import send_adapter
from .evaluation import SampledAhead


# Requests to a server at once, as many as TRL's client keeps connections.
MOST_REQUESTS = 64


class VLLMServerError(RunCannotGoOn, ConnectionError):
    """The vLLM server of a run in server mode does not answer; raised on all ranks together."""

    def __init__(self, url: str, model: str, reason: str):
        super().__init__(
            f"The vLLM server at {url} (vllm_server_base_url, or vllm_server_host and vllm_server_port) failed: "
            f"{reason}. If it is down, start it with `VLLM_SERVER_DEV_MODE=1 vllm serve {model} --logprobs-mode "
            'processed_logprobs --weight-transfer-config \'{"backend": "nccl"}\'`, then run the same command again.'
        )


@contextmanager
def server_errors_named(args, model) -> Iterator[None]:
    """Inside, a vLLM server that is not there is a [`VLLMServerError`]."""
    try:
        yield
    except requests.ConnectionError as error:
        if args.vllm_mode != "server":
            raise
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        raise VLLMServerError(url, model if isinstance(model, str) else model.name_or_path, str(error)) from error


def _seed(key: list[int]) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def needs_text(params) -> bool:
    """Whether a request with these sampling parameters is stopped or constrained by its text."""
    return bool(params.stop or params.bad_words or params.structured_outputs)


@contextmanager
def seeded_engine(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, a colocated engine, which samples from its process's random generators, draws what `seed` gives."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


class RolloutGeneration(VLLMGeneration):
    """
    [`~trl.generation.vllm_generation.VLLMGeneration`] for any number of completions per prompt.

    - Colocated, neighbouring rows with the same prompt become one request that asks for that many completions: one
      engine call per batch, in which each prompt is prefilled once. TRL sends each row as a request.
    - Colocated, tokens are not turned into text where nobody reads it: TRL decodes the completions itself.
    - An evaluation is one call for all of its prompts, which TRL then gets batch by batch.
    - With a server, each row is a request. TRL takes every `num_generations`-th prompt, which gives the prompts of
      groups of other sizes each other's completions. If the server is gone, all ranks get a [`VLLMServerError`] at
      the same place; TRL's error reaches the main process alone, while the others wait for it.
    - On a CPU, weights are synced by vLLM's own reload: it repacks them after loading, so TRL's way fails there. The
      LM head is repacked once more, because the reload passes over a tied one.
    - With `vllm_lora_sync`, a sync sends the adapter alone, and every call of the engine samples with it.
    """

    _text_is_read: bool = True
    _seeds: Iterator[int] | None = None
    _of_rows: Mapping[str, list] = MappingProxyType({})
    _ahead: SampledAhead | None = None
    _server_error: str | None = None
    _syncs_adapter: bool = False
    _adapter = None

    @classmethod
    def adopt(cls, generation: VLLMGeneration, syncs_adapter: bool = False) -> "RolloutGeneration":
        """
        Make the object that [`~trl.GRPOTrainer`] has built one of this class: TRL offers no other place for it.

        Args:
            generation ([`~trl.generation.vllm_generation.VLLMGeneration`]): TRL's object.
            syncs_adapter (`bool`, *optional*, defaults to `False`): whether a sync sends the adapter alone.
        """
        generation.__class__ = cls
        generation._syncs_adapter = syncs_adapter
        if generation.mode == "server":
            if generation.accelerator.is_main_process:
                client = generation.vllm_client
                generation._client_generate, client.generate = client.generate, generation._generate_or_nothing
                generation._client_update = client.update_named_params
                client.update_named_params = generation._update_or_nothing
        else:
            # Below TRL, which flattens the completions of each request itself.
            generation._llm_generate = generation.llm.generate
            generation.llm.generate = generation._generate_merged
        return generation

    @contextmanager
    def seeded(self, key: list[int]) -> Iterator[None]:
        """
        Inside, the calls of a colocated engine are seeded, each by its number, also those that rounds, a rollout
        function or tools make. Whoever calls the engine hands it no seeds.

        Args:
            key (`list[int]`): such as the run's seed and the number of the generation batch.
        """
        engine = self.accelerator.process_index // self.tensor_parallel_size
        self._seeds = (_seed([*key, call, engine]) for call in count())
        try:
            yield
        finally:
            self._seeds = None

    @contextmanager
    def rows_with(self, **of_rows: np.ndarray) -> Iterator[None]:
        """
        Inside, rows have sampling parameters of their own, and not those that TRL hands the engine.

        Args:
            **of_rows (`np.ndarray` of shape `(N,)`):
                `temperature` or `max_tokens` of each row, over all processes. To a server, `max_tokens` alone.
        """
        before = self._of_rows
        self._of_rows = before | {name: self._rows_of_engine(values).tolist() for name, values in of_rows.items()}
        try:
            yield
        finally:
            self._of_rows = before

    def _rows_of_engine(self, values: np.ndarray) -> np.ndarray:
        if self.mode == "server":
            return values
        # Processes that share an engine share its rows.
        engine = self.accelerator.process_index // self.tensor_parallel_size
        return np.split(values, self.accelerator.num_processes // self.tensor_parallel_size)[engine]

    @contextmanager
    def sampling_ahead(self, prompts: list[list[int]]) -> Iterator[None]:
        """Inside, the first call samples for all of these prompts, and further ones get what there is for theirs."""
        self._ahead = SampledAhead(prompts)
        try:
            yield
        finally:
            self._ahead = None

    def _generate_merged(self, prompts, sampling_params, **kwargs):
        # What a rollout function asks for in another form than TRL's is left as it is.
        is_merged = getattr(sampling_params, "n", None) == 1 and all(
            "prompt_token_ids" in prompt for prompt in prompts
        )
        whole_call = nullcontext()
        if self._seeds is not None:
            whole_call = seeded_engine(next(self._seeds), self.accelerator.device)
        if is_merged:
            detokenize = sampling_params.detokenize and (self._text_is_read or needs_text(sampling_params))
            prompts, sampling_params = self._merge(prompts, sampling_params, detokenize, self._of_rows)
        if self._adapter is not None:
            kwargs.setdefault("lora_request", self._adapter)
        with whole_call:
            return self._llm_generate(prompts, sampling_params=sampling_params, **kwargs)

    @staticmethod
    def _merge(prompts: list[dict], params, detokenize: bool, of_rows: Mapping[str, list]) -> tuple[list[dict], list]:
        """Requests in place of neighbouring rows with the same prompt and sampling parameters."""

        def request(row: int):
            own = [values[row] for values in of_rows.values()]
            return prompts[row]["prompt_token_ids"], prompts[row].get("multi_modal_data"), own

        merged_prompts, merged_params = [], []
        for (_, _, own), group in groupby(range(len(prompts)), key=request):
            first, *copies = group
            merged_prompts.append(prompts[first])
            merged_params.append(params.clone())
            merged_params[-1].n = 1 + len(copies)
            merged_params[-1].detokenize = detokenize
            for name, value in zip(of_rows, own, strict=True):
                setattr(merged_params[-1], name, value)
        return merged_prompts, merged_params

    def _generate_or_nothing(self, **kwargs):
        # TRL hands the main process's answer to all ranks, so an empty one tells them all.
        try:
            within = self._generate_within_limits if "max_tokens" in self._of_rows else self._client_generate
            return within(**kwargs)
        except Exception as error:  # TRL's client raises plain ones for what the server refuses
            self._server_error = str(error)
            return {"prompt_ids": [], "completion_ids": [], "logprobs": None}

    def _generate_within_limits(self, prompts, **kwargs):
        """A request for the rows of each limit, for one has one limit; and many of them at once."""
        limits = np.array(self._of_rows["max_tokens"])

        def generate(limit: int) -> tuple[np.ndarray, dict]:
            rows = np.flatnonzero(limits == limit)
            return rows, self._client_generate(
                **kwargs | {"prompts": [prompts[row] for row in rows], "max_tokens": limit}
            )

        distinct = np.unique(limits).tolist()
        with ThreadPoolExecutor(max_workers=min(len(distinct), MOST_REQUESTS)) as pool:
            rows, outputs = zip(*pool.map(generate, distinct), strict=True)
        places = np.argsort(np.concatenate(rows))

        def in_order(name: str) -> list | None:
            if any(output.get(name) is None for output in outputs):
                return None
            values = [value for output in outputs for value in output[name]]
            return [values[place] for place in places]

        return {name: in_order(name) for name in outputs[0]}

    def _update_or_nothing(self, metadata, parameters):
        try:
            self._client_update(metadata, parameters)
        except Exception as error:
            self._server_error = str(error)
            for _ in parameters:  # the other ranks take part in gathering them
                pass

    def _share_server_error(self):
        """Raise on all ranks what the main process has noticed."""
        (self._server_error,) = broadcast_object_list([self._server_error])
        if self._server_error is not None:
            self._raise_server_error()

    def _raise_server_error(self):
        url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        raise VLLMServerError(url, self.model.config._name_or_path, self._server_error or "seen on the main process")

    def generate(self, prompts, images, num_generations, profiler=None):
        ahead = self._ahead
        if ahead is None:
            return self._generate_rows(prompts, images, num_generations, profiler)
        if ahead.is_waiting:
            _, *columns = self._generate_rows(ahead.prompts, None, num_generations, profiler)
            ahead.add(columns)
        taken = ahead.take(prompts)
        return (prompts, *taken) if taken else self._generate_rows(prompts, images, num_generations, profiler)

    def _generate_rows(self, prompts, images, num_generations, profiler):
        if self.mode == "colocate":
            # TRL takes the tokens of this call, unless somebody has put a function of their own before the engine. A
            # rollout function that calls the engine itself may read the text.
            self._text_is_read = self.llm.generate != self._generate_merged
            try:
                return super().generate(prompts, images, num_generations, profiler)
            finally:
                self._text_is_read = True
        output = super().generate(prompts, images, 1, profiler)
        if len(output[1]) != len(prompts):
            self._raise_server_error()
        return output

    def _iter_named_params(self):
        # TRL asks for weights when the engine is awake for them. Of the base there is nothing to send.
        if self._syncs_adapter:
            self._adapter = send_adapter(self.model, self.llm, self._dist.gather_params)
        else:
            yield from super()._iter_named_params()

    def sync_weights(self):
        if self.mode == "server":
            # A server that is gone would leave the other ranks waiting inside the transfer.
            self._server_error = None
            if self.accelerator.is_main_process:
                try:
                    requests.get(f"{self.vllm_client.base_url}/health", timeout=60).raise_for_status()
                except requests.RequestException as error:
                    self._server_error = str(error)
            self._share_server_error()
        if self.mode == "colocate" and self.accelerator.device.type == "cpu" and not self._syncs_adapter:
            from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.reload_weights(weights_iterator=self._iter_named_params())
            # A tied head shares the embedding's weight, but computes with a repacked copy of its own. Nothing is sent
            # under its name, so the reload leaves that copy as it was.
            for layer in runner.get_model().modules():
                if isinstance(layer, ParallelLMHead):
                    layer.quant_method.process_weights_after_loading(layer)
            self.llm.reset_prefix_cache()
            return
        try:
            super().sync_weights()
        except requests.RequestException as error:  # after the transfer, when the server's cache is emptied
            self._server_error = self._server_error or str(error)
        if self.mode == "server":
            self._share_server_error()
