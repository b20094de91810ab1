"""Writes docs/troubleshooting.md from the code: ``python docs/make_troubleshooting.py``.

Every line that hift_ds can end with or warn with, where it comes from, what it means, the way out. A message of ours
says what was given and, after a semicolon or a colon, what to do; of those that do not, ``EXPLAINED`` does. A test
fails when the page lags behind the code, or a message has neither.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"  # whatever the line has there

AREAS = {
    "cli": "Commands", "train": "Run files and training", "data": "Data", "hf": "Model folders and exports",
    "checkpoint": "Checkpoints", "engine": "Engine and DeepSpeed", "optim": "Optimizers", "store": "States on host and disk",
    "layers": "Layer groups", "activations": "Activations", "integrations": "Trainers", "forecast": "Memory forecast",
    "simulation": "Memory forecast", "report": "Reports", "": "The \"hift\" block, launching and the rest",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Message:
    area: str
    text: str  # with GAP for values
    kind: str  # "error" or "warning"


def messages() -> list[Message]:
    """Of all modules, each text once, in the page's order."""
    found = set()
    classes = error_classes()
    for path in sorted((ROOT / "hift_ds").rglob("*.py")):
        parts = path.relative_to(ROOT / "hift_ds").parts
        area = AREAS.get(parts[0] if len(parts) > 1 else "", AREAS[""])
        source = path.read_text(encoding="utf-8")
        checked = {*classes, "ValueError"} if "pydantic" in source else classes
        for kind, node in _calls(ast.parse(source), checked):
            text = _text(node)
            if len(re.sub(rf"[{GAP}\W]", "", text)) >= 8:  # else it only passes on what another line says
                found.add(Message(area, text, kind))
    order = list(dict.fromkeys(AREAS.values()))
    return sorted(found, key=lambda message: (order.index(message.area), message.text.lower()))


def error_classes() -> set[str]:
    """Names of HiFTError, of what becomes one (``Malformed``), and of all below them."""
    bases: dict[str, set[str]] = {}
    for path in (ROOT / "hift_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
    names = {"HiFTError", "Malformed"}
    while more := {name for name, above in bases.items() if above & names} - names:
        names |= more
    return names


def _calls(tree: ast.AST, classes: set[str]) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and re.search(r"(^|_)why_|^broken_", node.name):  # says what is wrong
            for one in ast.walk(node):
                if isinstance(one, ast.Return) and isinstance(one.value, ast.JoinedStr) and _text(one.value)[0] == GAP:
                    yield "error", one.value
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in classes:
            yield "error", node.args[0]
        elif (
            isinstance(function, ast.Attribute)
            and function.attr in ("warning", "error")
            and isinstance(function.value, ast.Name)
            and function.value.id == "logger"
        ):
            yield "warning", node.args[0]


def _text(node: ast.expr) -> str:
    """A template as a person would read it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = re.sub(r"%[-+.\d]*[a-z]", GAP, node.value)
    elif isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = _text(node.left) + _text(node.right)
    else:
        text = GAP
    return re.sub(rf"{GAP}+", GAP, " ".join(text.split()))


# (pattern searched in the line, what it means and the way out), the first that is found. What is particular comes
# first.
EXPLAINED = [
    (
        r"pictures, video and sound",
        "Questions about a picture would be learned without it, and `<image>` as a text. Rows that need none may stay: without the column, or with it empty.",
    ),
    (
        r"another system prompt",
        "The row has a system prompt in the column `system` and another as the first message, and nobody knows which is meant. Take one out; the same one twice counts once.",
    ),
    (
        r"ranks do not run the same modules",
        "With ZeRO-3 the ranks gather each module's weights together, so that all must run the same modules in the same order. DeepSpeed gathers a *leaf module* with all that is in it, whatever runs inside: `leaf_module` in the config, or `deepspeed.utils.set_z3_leaf_modules(model, [MoEBlock])` before the engine is made ([zero3.md](zero3.md#modules-that-only-some-ranks-run)).",
    ),
    (
        r"the weights are evaluated in the shards",
        "transformers casts the model for evaluation outside of training, which weights in shards do not allow.",
    ),
    (
        r"is of evaluation alone",
        "`bf16_full_eval` and `fp16_full_eval` ask for evaluation in 16 bits; the DeepSpeed config decides what training is in.",
    ),
    (
        r"complex weights are not trained",
        "Masters, clipping and compact states are of real numbers. The same weights as pairs of real ones train as with torch's optimizers.",
    ),
    (
        r"float64 weights would be rounded",
        "Masters and states are fp32, which holds 24 bits of a weight's 53. In fp32, or 16 bits with masters, they train as with torch's optimizers; frozen ones may stay.",
    ),
    (
        r"are two parameters on the same memory",
        "`head.weight.data = embed.weight.data` makes two parameters of one memory: each has states and is updated, one over the other, and casting, cutting or moving weights ends it without a word. `head.weight = embed.weight` ties them: one parameter, one update.",
    ),
    (
        r"so that settings which differ",
        "The run goes on, with the settings of the run file; nobody can say which of them are others than when the checkpoint was saved. An earlier version's checkpoints have no such file.",
    ),
    (
        r"compiled whole is compiled anew",
        "`torch.compile` of the whole model (or `torch_compile`, or `engine.compile()`) guards on `requires_grad`, which differs from group to group. Blocks compiled one by one need three graphs in all.",
    ),
    (
        r"are not page-locked|page-locks no more",
        "What is page-locked cannot be swapped out, so no more is than leaves the system a tenth of what is free (`ulimit -l` may be less). Training goes on with ordinary memory, whose copies are slower and not beside the computing. Fewer processes on the node, `state.codec` or residency `disk` need less.",
    ),
    (
        r"a second gradient came in one backward",
        "Gradients travel to the other ranks as soon as backward has brought them, and this model brings one in several parts (a backward within a backward). With `overlap_comm: false` they travel after backward.",
    ),
    (
        r"tokens, and the model's table has",
        "The model learns a vector for each position and has none for those beyond the limit, so that the row would end training with an `IndexError` (on a GPU: a device-side assert). Cut rows when you tokenize them, or let the collator do it.",
    ),
    (
        r"is in use by another run",
        "Another process writes into this folder (a run, a Trainer, an export); the line names its process, host and start. The lock ends with that process, so there is nothing to delete.",
    ),
    (
        r"^the run ends at step",
        "The checkpoint has done more steps than the run file asks for. Raise `train.max_steps` or `train.epochs`, or begin in another folder.",
    ),
    (
        r"was saved with other settings",
        "The optimizer, or `hift: false`, is another than the checkpoint's, whose states mean nothing to it. Set it back, or begin in another `train.output_dir`.",
    ),
    (
        r"another rank is gone",
        "A process of the job died, hangs, or its node is away; this rank noticed it in a collective. Look at that rank's log (host memory full: `dmesg`), then start the same command again.",
    ),
    (
        r"a file with states in it",
        "A file of transformers' or DeepSpeed's in the checkpoint would run code, or is cut short. An older checkpoint is tried; if there is none, restore the file from a copy or remove the folder.",
    ),
    (
        r"going on from",
        "A checkpoint is incomplete, damaged or not on every node, as the line says, and an older whole one is used. Nothing to do.",
    ),
    (
        r"steps in a row were left out|no checkpoint to go back to|keeps coming back after rollbacks",
        "The run diverges: losses or gradients are not finite, or a thousand times the usual, again and again. Lower the learning rate, clip gradients, look at the rows of those steps; `train.on_divergence` decides what happens.",
    ),
    (
        r"at the beginning: the run diverges",
        "The logged losses have risen to more than twice the first ones. Lower the learning rate, or clip gradients (`gradient_clipping`).",
    ),
    (
        r"no assistant message to learn from|nothing to learn in any|answer without content|answers are empty",
        "There would be nothing to learn. Look at the rows with `hift-ds preview RUN.yaml`; `data.format`, `data.columns` and `data.template` say how they are read.",
    ),
    (
        r"not every node|not the same folder on all nodes",
        'Ranks on several nodes see different folders. Save to a shared file system, or set `"checkpoint": {"use_node_local_storage": true}`.',
    ),
    (
        r"is in none of the files here|fp32 master of",
        "Each node has kept its own ranks' files. Bring them together in one folder.",
    ),
    (
        r"has no scheduler.pt",
        "The checkpoint's learning-rate schedule was DeepSpeed's, and this run's is the Trainer's, which has nothing to go on from. Put the `\"scheduler\"` back into the DeepSpeed config.",
    ),
    (
        r"does not list it",
        "A file that training would read was put into the checkpoint after it was saved. Remove it if you trust the rest.",
    ),
    (
        r"holds no DeepSpeed checkpoint|is not whole",
        "The folder has weights at most, and nothing that training goes on from (`save_only_model`, or files were lost). Name another.",
    ),
    (
        r"is not at letter",
        "The answer's text does not stand where the row says. Offsets count letters (Unicode code points), not bytes.",
    ),
    (
        r"not installed here|needs? the package|later to be installed|needs torch .* or later",
        "A package is not there, or too old. Install it as the line says.",
    ),
    (
        r"no free port",
        "Every port that would be tried is taken. Name one that is free.",
    ),
    (
        r"never completed",
        "The save was killed before its end, or the folder is not one of ours. Remove it; an older checkpoint is used.",
    ),
    (
        r"is damaged|is missing|cannot be read \(|has … bytes, expected|truncated or not a safetensors|lacks tensor|lacks … weights|not a safetensors index|weights of … were not given|optimizer states expected",
        "A file is not what was written, or is not there: a bad disk, an interrupted download or copy. Restore it from a copy or fetch it again; a run goes on from an older whole checkpoint by itself.",
    ),
    (
        r"holds more than plain values|weights are pickled",
        "The file is a pickle that could run code when it is loaded, so it is not loaded. Nothing of ours needs it: use files from a source that you trust.",
    ),
    (
        r"only JSON values, tensors",
        "`client_state` can hold plain values and tensors, so that loading it never runs code. Leave objects out.",
    ),
    (
        r"checkpoint not saved|failed while training went on|metrics not written",
        'The disk is full or cannot be written, and `"hift.checkpoint.on_error": "continue"` lets the run go on without that file. Free some space; the reason is in the line.',
    ),
    (
        r"without wait_for_checkpoint",
        "A program with partitioned weights and asynchronous saves ended without waiting for its last one. Call `engine.wait_for_checkpoint()` on all ranks before the end.",
    ),
    (
        r"given up: another rank failed|did not finish its files",
        "Another rank could not write its part of the checkpoint; its own line says why. The previous checkpoint is whole.",
    ),
    (
        r"is the checkpoint of another model",
        "Names or shapes of weights differ from the model's. Give the model that was trained, or `load_module_strict=False` for the names that fit.",
    ),
    (
        r"without a \"hift\" block: only such",
        "It was saved with `hift: false`. Load it with that, and save its weights with the Trainer's `save_model`.",
    ),
    (
        r"^checkpoint: ",
        'Something is another than when the checkpoint was saved, and the line says what is kept and what is the run\'s. See "When the run is not the same" in [checkpoints.md](checkpoints.md).',
    ),
    (
        r"nothing is trained",
        "The checkpoint has all the steps that were asked for. Raise `max_steps` to go on.",
    ),
    (
        r"is not what was written",
        'States are kept on disk and came back with other bytes: the disk fails, or another program wrote there. Start again from the last checkpoint, with another `"hift.state.path"`.',
    ),
    (r"removing the state files", "Left by a run on this machine that was killed. Nothing to do."),
    (
        r"(moving|writing|reading) optimizer states",
        'The disk of `"hift.state.path"` is full or fails, as the line says. Free some, or give another path; go on from the last checkpoint.',
    ),
    (
        r"is damaged|state .* cannot be saved|scheduler's state cannot",
        "It holds an object that has no exact form in JSON. Use an optimizer or scheduler whose state is numbers and tensors.",
    ),
    (
        r"^… out of memory|not even one row|no room for the weights",
        "The device is full. The line compares with the forecast and lists what would fit: fewer rows, `activations` switches, states on the host. `hift-ds estimate` tries settings without the device.",
    ),
    (
        r"no space|bytes, … are free|will need …|cannot hold",
        "There is less disk or memory than is needed. Free some, or choose another folder.",
    ),
    (
        r"documents: … is for … files|names a data set of a",
        "The key says how one kind of source is read, and the source is of another kind. Remove it, or name the other file.",
    ),
    (
        r"saves nothing in this model",
        "The model does more with its logits than take a plain loss, so that they are computed whole all the same. The numbers are right; the switch can go.",
    ),
    (
        r"comes with hift_ds",
        "A file or a size that is given by name alone is looked up among those in the package. The line lists the names.",
    ),
    (
        r"no permission|cannot write|cannot be written|cannot be made",
        "This user may not write there. Another folder, or its permissions.",
    ),
    (
        r"not numbers any more",
        "A gradient was not finite and nothing skips the step. Lower the learning rate, clip, or look at the rows.",
    ),
    (
        r"not finite",
        "A loss was not finite; nothing was updated. Lower the learning rate, or look at that batch.",
    ),
    (r"unknown key|did you mean|: unknown …", "A key is misspelled or belongs elsewhere; the nearest one is named."),
    (
        r"this key is required",
        "The run file lacks a key without a default. Add it; [run_file.md](run_file.md) lists all.",
    ),
    (
        r"no such (run )?file|no such folder|does not exist|there is no … in this folder|no config.json|exists already",
        "A path is wrong, or relative to another folder than you think. Look at the path in the line.",
    ),
    (
        r"not valid (JSON|YAML|CSV)|not UTF-8|cannot read|cannot be loaded|cannot load|has splits|lists data sets|no data set",
        "The file cannot be read as what its name says; the line has the place and the reason.",
    ),
    (
        r"no known format|no column|which format \S+ needs|named columns|fields as in the first|no rows in",
        "The rows have other columns than the formats in [data.md](data.md). Set `data.format`, or map names with `data.columns`.",
    ),
    (
        r"preference data|train on one kind",
        "Chosen and rejected answers are for DPO and its kin: [tasks.md](tasks.md). All rows of a run are texts, or all are messages.",
    ),
    (
        r"cannot be set here|has a key of its own",
        "hift_ds decides this argument of transformers' itself, or the run file has a key for it. Do what stands at the end of the line.",
    ),
    (
        r"^label |: label |labels are|this one needs the package|task here is|but task ",
        "The task and the data, or the packages, do not go together. [tasks.md](tasks.md) has the columns, labels and packages of each task.",
    ),
    (
        r"a checkpoint could not hold it",
        'The config or the tokenizer refuses to be saved, for the reason in the line: it would have ended the run at its first checkpoint. Repair it, or train without checkpoints (`save_strategy="no"`).',
    ),
    (
        r"does not come to an end",
        "A loop of the chat template has no end, by mistake or on purpose. Use another template; the file is `chat_template.jinja` or in tokenizer_config.json.",
    ),
    (
        r"of … rows; see data.template",
        "So many rows have roles in an order that the template refuses (alternating roles, no system prompt), or no answer, that the template is the wrong one, or `data.format`. Fewer than a tenth of the rows are passed over and counted.",
    ),
    (
        r"chat template|data.template",
        "The template does not render these messages, or not their answers. Set `data.template`; `hift-ds preview` shows what is learned.",
    ),
    (
        r"[tT]okenizer",
        "The tokenizer's files are missing, of another model, or do not come back as they were. Use the folder that the model came with, or set `model.tokenizer`.",
    ),
    (
        r"quantized|cannot be trained|GGUF|LoRA adapter|other models: hift_ds",
        "The folder holds something that cannot be trained as it is. Give the unquantized, merged model.",
    ),
    (
        r"model_type|architectures|transformers (has|cannot)|has no parameter of that name|has no place|shape …|do not make|differ, but the model ties|names it|config of this|cannot build|places there",
        "The weights and `config.json` of the folder do not belong together, or this transformers does not know the model. Fetch the folder again, or another version of transformers.",
    ),
    (
        r"matches|matched|regular expression|given twice|requires_grad|no parameter is trainable|no module or parameter|arch:|no layer group has",
        "The patterns, or the trainable weights, do not make layer groups. `hift-ds groups MODEL` prints the names; [groups.md](groups.md) the rules.",
    ),
    (
        r"takes in the whole model|some groups will not be trained",
        "The run is too short for its groups, or `group_size` is larger than the model. Choose another `group_size` or more steps ([groups.md](groups.md)).",
    ),
    (
        r"not supported with a \"hift\" block|is not supported|are not supported|cannot train one layer group|keeps … \(",
        "DeepSpeed or the optimizer has a feature that contradicts training one group at a time. Remove the key, or use DeepSpeed without the block.",
    ),
    (
        r"disagree|in the DeepSpeed config|has no effect|both true|choose one|both given|remove one|needs|hift: false with",
        "Two settings contradict each other. Change the one that the line names.",
    ),
    (
        r"processes were started|process sees|started … processes|did not build its engine|no Accelerator|serves one train|was not told when|its engine built in its own constructor|training has ended",
        "The program was started, or the engine made, in a way that does not fit. The line says how to start it.",
    ),
    (
        r"save_checkpoint|load_checkpoint|backward|initialize|evaluate\(\)",
        "A call at the wrong moment or with a wrong argument; the line says which is right.",
    ),
    (
        r"not installed|pip install|needs torch|needs the package|fake devices|this accelerator does not",
        "The environment or the device lacks something that the setting needs. Install it, or change the setting.",
    ),
    (
        r"longer than the … positions",
        "Samples may not be longer than the positions that the model was made with. Lower `data.max_length`, or `--length`.",
    ),
    (
        r"changes a run file, and none is given",
        "An argument `section.key=value` changes a run file. Name the run file before it.",
    ),
    (
        r"no whole checkpoint there",
        "The folder holds no checkpoint that is complete; the line says what is wrong with each. Name another run folder, or a `checkpoint-N` in one.",
    ),
    (r"which has no keys", "A key of the override stands below one that is a plain value in the run file."),
    (
        r"^(deepspeed|model.path|train.resume): …$",
        "The key named at the beginning has a value that does not work; the rest of the line is that part's own message, which is on this page too.",
    ),
    (
        r"train.report_to",
        "The logger is not known to transformers, or its package is not installed. Install it, or remove it from `train.report_to`.",
    ),
    (
        r"transformers does not accept|files of a checkpoint of this model could not be written",
        "A check of transformers' own fails, found before the first step instead of at the first save; its message is the rest of the line.",
    ),
    (
        r"data.val_size: … holds out",
        "More rows would be held out than there are. Lower `data.val_size`, or give `data.eval`.",
    ),
    (
        r"no (…|'tokens'); found columns",
        "A row lacks the text that the task reads, or it is empty. Rename the column (`data.columns`), or take the row out.",
    ),
    (
        r"…: longer than data.max_length",
        "A reward is of a whole answer, so none is cut. Raise `data.max_length`, or shorten the row.",
    ),
    (
        r"has neither file_name",
        "An entry of `dataset_info.json` names neither a file nor a data set of the Hub.",
    ),
    (r"export folder … is a file", "The export needs a folder. Choose another `export.dir`."),
    (
        r"the Hugging Face Hub does not give it",
        "Neither a folder here nor a model that the Hub gives: a misspelled name, no network, or a gated model (`hf auth login`).",
    ),
    (
        r"trainable parameters are not in the optimizer",
        "The optimizer was made over fewer parameters than are trainable. Give it all, or freeze the rest.",
    ),
    (
        r"optimizer.params|optimizer.type",
        "The optimizer's class or one of its options does not exist, or has another name. Write a class of `torch.optim` or a dotted path, and its own options.",
    ),
    (
        r"is not a folder that this process can write",
        'States on disk need a folder that this user may write. Give another `"hift.state.path"`.',
    ),
    (
        r"no moment among the states",
        "The codec compacts moments, and this optimizer has none. Leave the codec out.",
    ),
    (
        r"the DeepSpeed config has no",
        'The Trainer trains through our engine only with a `"hift"` block. Add it as the line says.',
    ),
    (
        r"cannot be run ahead",
        "The learning-rate schedule cannot be asked for its coming values, so that a warm-up begins with this step's rate. Nothing to do.",
    ),
]


def explanation(message: Message) -> str | None:
    """What the line means and the way out; None for a message that nobody has explained."""
    for pattern, text in EXPLAINED:
        if re.search(pattern, message.text):
            return text
    # Our own form: what was given, what was expected; what to do.
    found = re.search(
        rf"(?:; (?!got |found|{GAP}|the nearest)|: (?=(?:give|set|pass|use|call|add) ))((?:(?!; ).)*)$",
        message.text,
    )
    if found:
        return f"The line says it: {found[1].replace('|', chr(92) + '|')}."
    if "expected" in message.text:
        return "A setting, an argument or a file holds something else than it can. Write what is expected; the line names the place."
    if "; the nearest" in message.text:
        return "The batch sizes do not multiply out. Take one of the numbers in the line."
    return None


WITHOUT_A_LINE = [
    "",
    "## What ends without a line of ours",
    "",
    "**ZeRO-3: `op.preamble.length <= op.nbytes ... collective mismatch` and SIGABRT (gloo), or all ranks wait (NCCL).** One rank",
    "has run a module that another has not: an expert, or a branch that depends on the data. Where that is seen before weights are",
    "gathered it is a line (above); a module that comes last before ranks exchange something else is not. The ways out are the same:",
    "[zero3.md](zero3.md#modules-that-only-some-ranks-run).",
    "",
    "**A rank is killed, or the machine stops.** `hift-ds train` names the rank, its step, its group and the checkpoint to go on from;",
    "SIGKILL without more is mostly the system's, for want of host memory (`dmesg`).",
]


def page() -> str:
    lines = [
        "# Troubleshooting",
        "",
        "Every line that hift_ds can end or warn with, by where it comes from; `…` stands for what differs. Written from the code",
        "by `python docs/make_troubleshooting.py`. Search it for the words of your line without its numbers and names. An error ends",
        "a command with exit code 2 and changes nothing that was whole; 75: a rank that hung ended itself; 128 + N: signal N.",
        "For what happens to checkpoints see [checkpoints.md](checkpoints.md).",
    ]
    area = ""
    for message in messages():
        if message.area != area:
            area = message.area
            lines += ["", f"## {area}", "", "| the line | what it means, the way out |", "|---|---|"]
        text = message.text.replace("|", "\\|")
        mark = " (warning)" if message.kind == "warning" else ""
        lines.append(f"| `{text.replace('`', chr(39))}`{mark} | {explanation(message) or '?'} |")
    return "\n".join([*lines, *WITHOUT_A_LINE]) + "\n"


def main() -> int:
    unexplained = [message.text for message in messages() if explanation(message) is None]
    for text in unexplained:
        print(f"not explained: {text}", file=sys.stderr)
    PAGE.write_text(page(), encoding="utf-8")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
