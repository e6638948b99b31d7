"""Make training of a plan cheap: ``prepare`` changes how a model runs, ``restore`` takes everything back.

    plan = superfine.select(model, "last:2", "head")
    print(superfine.prepare(model, plan, checkpointing=True))
    optimizer = plan.optimizer("adamw", lr=2e-5)
    ...
    superfine.restore(model)

What the model computes stays the same; docs/prepare.md says what each part does and when it pays.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from superfine import _shortcut, _suffix_checkpointing, _truncate
from superfine._guard import Flags, Sized
from superfine._processes import check_reduced, refuse_sharded
from superfine._swap import Part, add_part, has_part, remove_part
from superfine.select import Plan, uncompiled

__all__ = ["Prepared", "prepare", "restore"]

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def prepare(
    model: nn.Module,
    plan: Plan,
    *,
    truncate: bool = True,
    eval_prefix: bool = False,
    checkpointing: bool | str = False,
    fuse: bool = True,
    recompute: bool = False,
    shortcut: bool = True,
) -> Prepared:
    """Change how `model` runs so that training `plan` costs no more than it must.

    Classes of modules are replaced by subclasses of the same name: parameters, `state_dict`, `isinstance`, copies,
    pickles, `torch.compile`, `transformers.Trainer` and PEFT see the model that they know. Prepare after `select`,
    and before the optimizer is made and the model is wrapped for data parallelism. The plan's slices are installed.

    From then on every forward with gradients in training mode, and every step of a `plan.optimizer`, raises
    `ValueError` where a parameter is frozen or unfrozen against the plan; :meth:`Prepared.update` changes the plan.

    Args:
        model: the plan's model, compiled or not.
        plan: what :func:`superfine.select` returned last.
        truncate: run what comes before the first trained parameter without a graph, also where the inputs were made
            to require gradients. No gradients of the inputs, then. The first forward with gradients checks that
            nothing trained is used there, and raises `ValueError` naming it.
        eval_prefix: keep that part in eval mode (no dropout) when `model.train()` is called. Changes results.
        checkpointing: True to keep of each block, from the first trained one on, its inputs alone in training and run
            it again in backward; `"every:N"` for the first of them and every Nth after it, which keeps more and runs
            less again. Dropout draws the same numbers again. Caches of keys and values and transformers' own
            checkpointing are off.
        fuse: replace norms, activations, MLPs and LoRA layers by ops that keep only what the plan needs.
        recompute: let those MLPs compute in backward what they would keep otherwise.
        shortcut: let the last layer of a sequence classifier (BERT-, GPT-2- or Llama-like) compute only the position
            that the head reads. Not in a forward that is asked for hidden states, attentions or a cache.

    Returns:
        What was done, and what was not and why: `print` it.

    Raises:
        TypeError: `model` is no module, or wrapped for data parallelism; `plan` is no plan.
        ValueError: the model is prepared already; the plan is another model's or was replaced by a later `select`; an
            argument is not one of those above; a module's forward was replaced on the module itself. The model is
            then what it was.
    """
    model = _checked(model, plan)
    every = _suffix_checkpointing.parse(checkpointing)
    if recompute and not fuse:
        raise ValueError("prepare: recompute is True and fuse is False; expected fuse=True with it")
    options = {
        "truncate": truncate, "eval_prefix": eval_prefix, "checkpointing": checkpointing, "fuse": fuse,
        "recompute": recompute, "shortcut": shortcut,
    }  # fmt: skip
    for name, value in options.items():
        if name != "checkpointing" and not isinstance(value, bool):
            raise TypeError(f"prepare: {name} is {value!r}; expected True or False")
    if any("_superfine_prepared" in vars(module) for module in model.modules()):
        raise ValueError("prepare: the model is prepared already; expected superfine.restore(model) before")
    if "forward" in vars(model):
        raise ValueError(
            "prepare: model.forward was replaced on the model itself (as accelerate does for mixed precision); "
            "expected the class's own, as after `del model.forward`"
        )
    _check_flags(model, plan, {name for name, _ in plan.named_parameters()})
    prepared = Prepared(model, plan, options)
    vars(model)["_superfine_prepared"] = prepared
    try:
        prepared._install(every)
    except BaseException:
        _take_back(model, prepared)
        raise
    return prepared


def restore(model: nn.Module) -> None:
    """Make a prepared model what it was: classes, attributes, modes and transformers' checkpointing.

    Trained values stay, those of slices are merged into their weights. Takes a model that was taken out of a prepared
    one, too, as by PEFT's `merge_and_unload()`. Raises `ValueError` where the model is not prepared, or where someone
    else changed its class afterwards (as `fully_shard` does).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model is {type(model).__name__}; expected a torch.nn.Module")
    model = uncompiled(model)
    prepared = vars(model).get("_superfine_prepared")
    if prepared is None:
        # PEFT's merge_and_unload() hands out the model within the one that was prepared.
        parts = (
            _truncate.NoGraph,
            _truncate.Detached,
            _suffix_checkpointing.Checkpointed,
            _shortcut.LastLayer,
        )
        if not any(has_part(module, part) for module in model.modules() for part in parts):
            raise ValueError(
                "restore: the model is not prepared; expected one that superfine.prepare has changed"
            )
    elif not has_part(model, Prepares) and isinstance(model, Prepares):
        raise ValueError(
            "restore: the model's class was changed after prepare (as fully_shard does); expected the class that "
            "prepare gave it"
        )
    _take_back(model, prepared)


@dataclass(eq=False, repr=False)
class Prepared:
    """What :func:`prepare` has done to a model: `print` it. The model keeps it, copies have their own.

    ``done`` and ``not_done`` map parts (``"truncate"``, ``"checkpointing"``, ...) to what was done, or why not.
    """

    model: nn.Module
    plan: Plan
    options: dict[str, Any]
    done: dict[str, str] = field(default_factory=dict)
    not_done: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.flags = Flags(self.model, ())
        self._truncation: _truncate.Truncation | None = None
        self._checkpointed_before: list[str] = []  # modules where transformers' own checkpointing was on
        self._without_cache = False
        self._fused = self._sliced = False

    def update(self, plan: Plan) -> None:
        """Prepare the same model for another plan, with the same options, as when selections rotate.

        `plan` is what a later `superfine.select` of the model returned. Optimizers of the earlier plan no longer fit.
        Not after the model was wrapped for data parallelism, and not with slices: `select` asks to restore the model
        before, and `prepare` takes the new plan. Raises as :func:`prepare` does.
        """
        model = _checked(self.model, plan)
        if vars(model).get("_superfine_prepared") is not self:
            raise ValueError("Prepared.update: the model was restored since; expected superfine.prepare")
        _check_flags(model, plan, {name for name, _ in plan.named_parameters()})
        # Accelerate's mixed precision keeps a function there that calls the class's.
        kept = vars(model).pop("forward", None)
        try:
            restore(model)
            changed = prepare(model, plan, **self.options)
            vars(self).update(vars(changed))
            vars(model)["_superfine_prepared"] = self
        finally:
            if kept is not None:
                vars(model)["forward"] = kept

    def _install(self, every: int) -> None:
        model, plan, options = self.model, self.plan, self.options
        if plan.slices:
            from superfine import slices

            slices.install(model, plan.slices)
            self._sliced = True
            self.done["slices"] = f"{len(plan.slices)} with a parameter of their own"
        trained = dict(plan.named_parameters())
        if options["fuse"]:
            from superfine import fused_modules

            report = fused_modules.install(model, plan, recompute=options["recompute"])
            self._fused = True
            self._note(
                "fuse", f"{len(report.changed)} modules" if report.changed else "", "no module that it serves"
            )
        else:
            self.not_done["fuse"] = "not asked for"
        if options["shortcut"]:
            found, text = _shortcut.shorten(model)
            self._note("shortcut", text if found else "", text)
        else:
            self.not_done["shortcut"] = "not asked for"
        sites = _truncate.find_sites(model, trained)
        self._install_prefix(sites, trained)
        if every:
            self._install_checkpoints(sites, every)
        else:
            self.not_done["checkpointing"] = "not asked for"
        self.flags = Flags(model, trained)
        self.flags.check()
        for module in model.modules():
            if hasattr(type(module), "resize_token_embeddings") and "forward" not in vars(module):
                add_part(module, Sized)
        add_part(model, Prepares)

    def _install_prefix(self, sites: _truncate.Sites, trained: dict[str, nn.Parameter]) -> None:
        for name, install in (("truncate", self._cut), ("eval_prefix", self._keep_in_eval)):
            if not self.options[name]:
                self.not_done[name] = "not asked for"
            elif sites.why_none is not None:
                self.not_done[name] = sites.why_none
            else:
                self.done[name] = install(sites, trained)

    def _cut(self, sites: _truncate.Sites, trained: dict[str, nn.Parameter]) -> str:
        self._truncation = _truncate.truncate(self.model, sites, dict(trained))
        end = "up to the head" if sites.entry is None else f"up to {sites.entry}"
        return f"no graph {end} ({_listed(sites.prefix)})" if sites.prefix else f"no graph {end}"

    def _keep_in_eval(self, sites: _truncate.Sites, trained: dict[str, nn.Parameter]) -> str:
        _truncate.eval_prefix(self.model, sites)
        return f"in eval mode: {_listed(sites.prefix)}"

    def _install_checkpoints(self, sites: _truncate.Sites, every: int) -> None:
        model = self.model
        if not sites.suffix:
            self.not_done["checkpointing"] = "no block is after the first trained parameter"
            return
        chosen = _suffix_checkpointing.checkpoint_blocks(model, sites.suffix, every)
        self._checkpointed_before = _suffix_checkpointing.switch_off(model)
        inner = getattr(model, "get_base_model", lambda: model)()  # PEFT's wrappers hand on all arguments
        self._without_cache = "use_cache" in inspect.signature(inner.forward).parameters
        text = f"{len(chosen)} of {len(sites.suffix)} blocks from {sites.suffix[0]} on"
        if self._checkpointed_before:
            text += "; transformers' own is switched off"
        self.done["checkpointing"] = text

    def _note(self, part: str, done: str, not_done: str) -> None:
        if done:
            self.done[part] = done
        else:
            self.not_done[part] = not_done

    def __repr__(self) -> str:
        return f"Prepared({', '.join(self.done) or 'nothing'})"

    def __str__(self) -> str:
        lines = [f"{part:<14}{text}" for part, text in self.done.items()]
        lines += [f"{part:<14}- ({text})" for part, text in self.not_done.items()]
        return "\n".join(lines)


class Prepares(Part):
    """The model as a whole: checks what trains, and knows when a forward has come to its end."""

    _superfine_prepared: Prepared

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        prepared = self._superfine_prepared
        if prepared._without_cache and self.training and torch.is_grad_enabled():
            kwargs["use_cache"] = False
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        # Without gradients nothing trains: PEFT's disable_adapter() freezes adapters for a reference's forward.
        if self.training and torch.is_grad_enabled():
            prepared.flags.check("forward")
            check_reduced(prepared.flags)
        truncation = prepared._truncation
        if truncation is None or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        truncation.running = self.training
        try:
            output = super().forward(*args, **kwargs)
        finally:
            truncation.running = False
            truncation.seen.clear()  # the nodes hold on to activations
        if not truncation.checked:
            truncation.done()
        return output


def _checked(model: Any, plan: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model is {type(model).__name__}; expected a torch.nn.Module")
    if not isinstance(plan, Plan):
        raise TypeError(f"prepare: plan is {type(plan).__name__}; expected what superfine.select returns")
    if type(model).__name__ in _WRAPPERS:
        raise TypeError(f"prepare: model is {type(model).__name__}; expected the model before it is wrapped")
    model = uncompiled(model)
    refuse_sharded("prepare", model)
    if plan.model is not model:
        raise ValueError(
            "prepare: plan is of another model; expected the one that superfine.select was given"
        )
    return model


def _check_flags(model: nn.Module, plan: Plan, trained: set[str]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in trained):
            problem = "trains against" if parameter.requires_grad else "is frozen against"
            raise ValueError(
                f"prepare: {name!r} {problem} the plan; expected the plan of the last superfine.select, and "
                "requires_grad as it left it"
            )


def _take_back(model: nn.Module, prepared: Prepared | None) -> None:
    remove_part(model, Prepares)
    for module in model.modules():
        _suffix_checkpointing.leave(module)
        _truncate.leave(module)
        _shortcut.leave(module)
        remove_part(module, Sized)
    if prepared is not None:
        _suffix_checkpointing.switch_on(model, prepared._checkpointed_before)
    if prepared is None or prepared._fused:
        from superfine import fused_modules

        fused_modules.remove(model)
    if prepared is None or prepared._sliced:
        from superfine import slices

        slices.remove(model)
    vars(model).pop("_superfine_prepared", None)


def _listed(paths: tuple[str, ...]) -> str:
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} to {paths[-1]}"
