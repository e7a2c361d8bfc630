"""The API page: what the modules that it lists define, from their docstrings.

Each item of its list becomes a section with the module's public classes and functions, each with
its signature and its prose. The source is parsed, not imported, so the site is built without torch.
"""

import ast
from html import escape

from annotated import Shows, raw
from docutils import nodes
from prose import to_html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from source import Definition, Source
from sphinx.application import Sphinx

PAGE = "api"
LINE = 88  # characters of a signature that fit in a line of the page


class Api(Shows):
    def apply(self) -> None:
        if self.env.docname == PAGE:
            self.depends_on_the_source()
            page = next(iter(self.document.findall(nodes.section)))
            sections = [self.section(source) for source in self.sources_listed(page)]
            page.children = [each for each in page if not isinstance(each, nodes.bullet_list)]
            page += sections

    def section(self, source: Source) -> nodes.section:
        section = nodes.section(ids=[f"api-{source.module.replace('.', '-')}"])
        section += nodes.title("", source.module)
        first_sentence = ast.get_docstring(source.tree).partition("\n\n")[0]
        section += raw(to_html(first_sentence, self.link((source.module, ""))))
        for name, node in source.definitions.items():
            owner = source.definitions.get(name.rpartition(".")[0])
            is_private = any(part.startswith("_") for part in name.split("."))
            if not is_private and not isinstance(owner, ast.FunctionDef):
                section += raw(self.entry(source, name, node))
        return section

    def entry(self, source: Source, name: str, node: Definition) -> str:
        link, shown = self.link((source.module, name)), f"{source.module}.{name}"
        address = self.site.url((source.module, name), self.env.docname)
        code = highlight(signature(source, name, node), PythonLexer(), HtmlFormatter(nowrap=True))
        kind = "method" if "." in name else "definition"
        constructor = source.definitions.get(f"{name}.__init__")
        texts = [ast.get_docstring(each) for each in (node, constructor) if each]
        prose = "".join(to_html(text, link) for text in texts if text)
        return (
            f'<div class="api {kind}" id="api.{shown}">'
            f'<div class="highlight"><pre>{code}</pre></div>'
            f'<a class="to-source" href="{escape(address)}">source</a>'
            f'<div class="prose">{prose}</div></div>\n'
        )


def signature(source: Source, name: str, node: Definition) -> str:
    """As it is called: of a class its constructor, or the fields that it declares."""
    keyword, returns = "", ""
    if isinstance(node, ast.ClassDef):
        keyword = "class "
        constructor = source.definitions.get(f"{name}.__init__")
        inputs = arguments(source, constructor) if constructor else fields(source, node)
    else:
        inputs = arguments(source, node)
        returns = f" -> {as_written(source, node.returns)}" if node.returns else ""
        if "property" in [ast.unparse(decorator) for decorator in node.decorator_list]:
            return f"{name}{returns}"
    if keyword and not inputs:
        return f"{keyword}{name}"
    line = f"{keyword}{name}({', '.join(inputs)}){returns}"
    if len(line) <= LINE:
        return line
    inner = "".join(f"    {each},\n" for each in inputs)
    return f"{keyword}{name}(\n{inner}){returns}"


def as_written(source: Source, node: ast.AST) -> str:
    return ast.get_source_segment(source.text, node)


def arguments(source: Source, node: ast.FunctionDef) -> list[str]:
    """Each as text, with its type and default, and without `self`."""
    found = node.args
    positional = [*found.posonlyargs, *found.args]
    defaults = [None] * (len(positional) - len(found.defaults)) + found.defaults

    def texts(arguments, defaults) -> list[str]:
        texts = []
        for argument, default in zip(arguments, defaults, strict=True):
            text, equals = as_written(source, argument), " = " if argument.annotation else "="
            texts.append(f"{text}{equals}{as_written(source, default)}" if default else text)
        return texts

    inputs = texts(positional, defaults)
    if inputs[:1] == ["self"]:
        inputs = inputs[1:]
    if found.vararg:
        inputs.append(f"*{as_written(source, found.vararg)}")
    elif found.kwonlyargs:
        inputs.append("*")
    inputs += texts(found.kwonlyargs, found.kw_defaults)
    return inputs + ([f"**{as_written(source, found.kwarg)}"] if found.kwarg else [])


def fields(source: Source, node: ast.ClassDef) -> list[str]:
    """Of a named tuple or a data class; other classes have none that are given to them."""
    bases = [ast.unparse(base) for base in node.bases]
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    if "NamedTuple" not in bases and not any("dataclass" in each for each in decorators):
        return []
    return [as_written(source, each) for each in node.body if isinstance(each, ast.AnnAssign)]


def setup(app: Sphinx) -> dict:
    app.setup_extension("annotated")  # knows the modules
    app.add_transform(Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
