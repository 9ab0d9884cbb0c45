"""Prompts from the running Python's standard library: code to be completed.

Two styles. "function" ends after a function's signature and docstring, so that its body is to be
written; "module" ends at a line inside a module. Both carry some of the text before. A prompt
ends without its line break: the tokenizer joins line breaks with the indent that follows.
"""

import ast
import itertools
import random
from collections.abc import Iterator
from functools import cache

from specjax.data.corpora import Document, stdlib_documents, stdlib_source
from specjax.data.prompt_files import Prompt

CONTEXT_CHARS = 600  # of text before a function, at most
MODULE_CHARS = 900  # of a module before the cut, and of the reference after it, at most
_HEADER_CHARS = 600  # a training prompt's signature and docstring, at most
_BODY_LINES = 5  # a training prompt's body, at least
_CUT_EVERY = 20  # lines between the places where a training module may be cut
_MODULE_SHARE = 0.2  # of the training prompts

# (module, qualified name of a function), or (module, "") for the middle of a module. All of them
# have stood in the library for many releases. Ordered so that the first few already are varied.
STDLIB_PROMPTS: tuple[tuple[str, str], ...] = (
    ("xml.sax.saxutils", "prepare_input_source"),
    ("fractions", "Fraction.limit_denominator"),
    ("configparser", "RawConfigParser.add_section"),
    ("code", "InteractiveConsole.interact"),
    ("heapq", ""),
    ("sched", "scheduler.enterabs"),
    ("argparse", "_ActionsContainer.add_argument"),
    ("zipapp", "main"),
    ("netrc", "netrc._parse"),
    ("graphlib", ""),
    ("pprint", "PrettyPrinter._format"),
    ("urllib.robotparser", "RobotFileParser.parse"),
    ("bisect", "bisect_right"),
    ("logging.config", ""),
    ("selectors", "BaseSelector.get_key"),
    ("mimetypes", "MimeTypes.guess_type"),
    ("statistics", "fmean"),
    ("shlex", "split"),
    ("mimetypes", ""),
    ("textwrap", "dedent"),
    ("http.cookies", "BaseCookie.load"),
    ("logging.config", "DictConfigurator.configure_formatter"),
    ("tempfile", "mkdtemp"),
    ("urllib.robotparser", ""),
    ("graphlib", "TopologicalSorter.done"),
    ("reprlib", "recursive_repr"),
    ("fileinput", "FileInput.readline"),
    ("getpass", "getuser"),
    ("netrc", ""),
    ("timeit", "Timer.timeit"),
    ("calendar", "HTMLCalendar.formatmonth"),
    ("queue", "Queue.task_done"),
    ("html.parser", "HTMLParser.parse_endtag"),
    ("html.parser", ""),
    ("shelve", "Shelf.close"),
    ("colorsys", "rgb_to_hls"),
    ("filecmp", "cmp"),
    ("cmd", "Cmd.parseline"),
    ("tempfile", ""),
    ("tabnanny", "check"),
    ("csv", "Sniffer.sniff"),
    ("gzip", ""),
    ("wsgiref.headers", "Headers.add_header"),
    ("xml.sax.saxutils", "quoteattr"),
    ("fractions", "Fraction.from_decimal"),
    ("zipapp", ""),
    ("configparser", "RawConfigParser.read"),
    ("code", "InteractiveInterpreter.showsyntaxerror"),
    ("argparse", "ArgumentDefaultsHelpFormatter._get_help_string"),
    ("configparser", ""),
    ("netrc", "_netrclex.get_token"),
    ("pprint", "PrettyPrinter._pprint_chain_map"),
    ("urllib.robotparser", "Entry.applies_to"),
    ("pprint", ""),
    ("bisect", "bisect_left"),
    ("gzip", "GzipFile.read1"),
    ("selectors", "_BaseSelectorImpl._fileobj_lookup"),
    ("mimetypes", "MimeTypes.read_windows_registry"),
    ("fractions", ""),
    ("statistics", "stdev"),
    ("shlex", "shlex.get_token"),
    ("textwrap", "indent"),
    ("http.cookies", "Morsel.set"),
    ("textwrap", ""),
    ("logging.config", "DictConfigurator.common_logger_config"),
    ("tempfile", "mktemp"),
    ("graphlib", "TopologicalSorter.add"),
    ("reprlib", "Repr.repr_instance"),
    ("selectors", ""),
    ("fileinput", "FileInput.nextfile"),
    ("getpass", "unix_getpass"),
    ("timeit", "Timer.autorange"),
    ("calendar", "TextCalendar.formatyear"),
    ("argparse", ""),
    ("queue", "Queue.put"),
    ("html.parser", "HTMLParser.parse_pi"),
    ("shelve", "Shelf.sync"),
    ("colorsys", "hsv_to_rgb"),
    ("json.decoder", ""),
    ("filecmp", "dircmp.phase2"),
    ("cmd", "Cmd.cmdloop"),
    ("heapq", "heappop"),
    ("tabnanny", "Whitespace.not_less_witness"),
    ("statistics", ""),
    ("csv", "Sniffer._guess_quote_and_delimiter"),
    ("json.decoder", "JSONArray"),
    ("wsgiref.headers", "Headers.setdefault"),
    ("cmd", ""),
    ("xml.sax.saxutils", "XMLGenerator._qname"),
    ("fractions", "Fraction.__pow__"),
    ("configparser", "RawConfigParser.write"),
    ("argparse", "ArgumentParser.parse_known_args"),
    ("calendar", ""),
    ("zipapp", "_copy_archive"),
    ("netrc", "netrc._security_check"),
    ("pprint", "PrettyPrinter._pprint_set"),
    ("urllib.robotparser", "RobotFileParser.can_fetch"),
    ("queue", ""),
    ("gzip", "decompress"),
    ("selectors", "_fileobj_to_fd"),
    ("mimetypes", "MimeTypes.readfp"),
    ("fileinput", ""),
    ("textwrap", "TextWrapper._handle_long_word"),
    ("http.cookies", "Morsel.update"),
    ("logging.config", "DictConfigurator.add_filters"),
    ("difflib", ""),
    ("graphlib", "TopologicalSorter.get_ready"),
    ("reprlib", "Repr.repr_dict"),
    ("fileinput", "FileInput.fileno"),
    ("timeit", "Timer.print_exc"),
    ("sched", ""),
    ("calendar", "HTMLCalendar.formatyear"),
    ("queue", "Queue.get"),
    ("html.parser", "HTMLParser.parse_starttag"),
    ("shelve", "Shelf.__getitem__"),
    ("http.cookies", ""),
    ("colorsys", "yiq_to_rgb"),
    ("cmd", "Cmd.do_help"),
    ("heapq", "nlargest"),
    ("tabnanny", "Whitespace.less"),
    ("shlex", ""),
    ("difflib", "restore"),
    ("wsgiref.headers", "_formatparam"),
    ("fractions", "Fraction.__rpow__"),
    ("timeit", ""),
    ("configparser", "RawConfigParser.has_option"),
    ("argparse", "HelpFormatter.add_argument"),
    ("pprint", "PrettyPrinter._pprint_bytes"),
    ("gzip", "compress"),
    ("csv", ""),
    ("selectors", "SelectSelector.select"),
    ("logging.config", "BaseConfigurator.convert"),
    ("heapq", "heapify"),
    ("configparser", "RawConfigParser.get"),
    ("argparse", "ArgumentParser.add_subparsers"),
    ("pprint", "PrettyPrinter._format_items"),
    ("gzip", "GzipFile.close"),
    ("difflib", "diff_bytes"),
    ("argparse", "ArgumentParser.format_help"),
    ("statistics", "pstdev"),
    ("difflib", "SequenceMatcher.quick_ratio"),
)


def stdlib_prompts() -> list[Prompt]:
    """The prompts of `STDLIB_PROMPTS` that the running Python has, in order.

    An entry whose module or function is missing is skipped: the list spans versions of Python.
    `reference` is the library's own text: the function's body, or the module's next lines.
    """

    @cache
    def parsed(module: str) -> tuple[list[str], dict[str, ast.FunctionDef]]:
        source = stdlib_source(module) or ""
        return source.split("\n"), dict(_functions(ast.parse(source)))

    prompts = []
    for module, qualname in STDLIB_PROMPTS:
        lines, functions = parsed(module)
        if qualname in functions:
            prompts.append(_function_prompt(module, qualname, functions[qualname], lines))
        elif not qualname and len(lines) > 1:
            prompts.append(_module_prompt(module, module, len(lines) // 2, lines))
    return prompts


def stdlib_training_prompts(count: int, seed: int = 0) -> list[Prompt]:
    """`count` distinct prompts of the same two styles from modules that are not held out.

    One prompt a module in each pass over the shuffled modules, so a small count is varied too. The
    same Python, count and seed give the same prompts, and a larger count continues a smaller one.
    Raises ValueError where `count` is negative or more than the library yields.
    """
    if count < 0:
        raise ValueError(f"count: {count} is negative")
    documents = stdlib_documents("train")
    random.Random(seed).shuffle(documents)
    in_turn = _take_turns([_training_prompts(document, seed) for document in documents])
    prompts = list(itertools.islice(in_turn, count))
    if len(prompts) < count:
        raise ValueError(f"count: {count} prompts asked for, the library yields {len(prompts)}")
    return prompts


def _take_turns(sources: list[Iterator[Prompt]]) -> Iterator[Prompt]:
    """One item of each source, then the next of each, until all are used up."""
    while sources:
        alive = []
        for source in sources:
            if prompt := next(source, None):
                alive.append(source)
                yield prompt
        sources = alive


def _training_prompts(document: Document, seed: int) -> Iterator[Prompt]:
    """One module's prompts, shuffled. A generator, so that only modules in use are parsed."""
    module, lines = document.name, document.text.split("\n")
    rng = random.Random(f"{seed} {module}")
    nodes = [item for item in _functions(ast.parse(document.text)) if _fits(item[1], lines)]
    cuts = list(range(_CUT_EVERY, len(lines) - _CUT_EVERY, _CUT_EVERY))
    rng.shuffle(nodes)
    rng.shuffle(cuts)
    while nodes or cuts:
        if cuts and (not nodes or rng.random() < _MODULE_SHARE):
            cut = cuts.pop()
            yield _module_prompt(f"{module}:{cut}", module, cut, lines)
        else:
            qualname, node = nodes.pop()
            yield _function_prompt(module, qualname, node, lines)


def _functions(
    tree: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, node) of the functions and methods that have a body to complete."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and _body(node):
            yield prefix + node.name, node


def _body(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements after the docstring, if they start on a line of their own."""
    documented = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if documented else function.body
    before = function.body[0].end_lineno if documented else function.lineno
    return body if body and _first_line(body[0]) > before else []


def _first_line(node: ast.stmt) -> int:
    """The line, from 1, that a statement starts on, its decorators included."""
    return min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", ()))])


def _header_end(function: ast.FunctionDef, lines: list[str]) -> int:
    """The last line, from 1, of signature and docstring: comments before the body are its own."""
    end = _first_line(_body(function)[0]) - 1
    while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
        end -= 1
    return end


def _fits(function: ast.FunctionDef, lines: list[str]) -> bool:
    end = _header_end(function, lines)
    header = "\n".join(lines[_first_line(function) - 1 : end])
    return len(header) <= _HEADER_CHARS and function.end_lineno - end >= _BODY_LINES


def _function_prompt(
    module: str, qualname: str, function: ast.FunctionDef, lines: list[str]
) -> Prompt:
    start, end = _first_line(function) - 1, _header_end(function, lines)
    return Prompt(
        question_id=f"{module}.{qualname}",
        category="function",
        turns=("\n".join(_last_lines(lines[:start], CONTEXT_CHARS) + lines[start:end]),),
        reference="\n".join(lines[end : function.end_lineno]),
    )


def _module_prompt(question_id: str, module: str, cut: int, lines: list[str]) -> Prompt:
    while not lines[cut - 1].strip():
        cut -= 1
    return Prompt(
        question_id=question_id,
        category="module",
        turns=("\n".join(_last_lines(lines[:cut], MODULE_CHARS)),),
        reference="\n".join(lines[cut:])[:MODULE_CHARS].rpartition("\n")[0],
    )


def _last_lines(lines: list[str], limit: int) -> list[str]:
    """The last lines that have at most `limit` characters together, from the first with text."""
    start, size = len(lines), 0
    while start and (size := size + len(lines[start - 1]) + 1) <= limit:
        start -= 1
    while start < len(lines) and not lines[start].strip():
        start += 1
    return lines[start:]
