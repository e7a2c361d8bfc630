"""The directive of the API page: what the package's modules define, from their docstrings.

    ```{api} vae.py quantizer.py
    ```

lists the public classes and functions of these modules, each with its signature and its prose. The
source is parsed, not imported, so the site is built without torch.
"""

import ast
from html import escape

from annotated import Shows
from docutils import nodes
from prose import to_html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from source import Definition, Source
from sphinx.application import Sphinx

LINE = 88  # characters of a signature that fit in a line of the page


class Api(Shows):
    def run(self) -> list[nodes.Node]:
        self.start()
        return [self.section(self.site.source(path)) for path in self.arguments[0].split()]

    def section(self, source: Source) -> nodes.section:
        section = nodes.section(ids=[f"api-{source.module.replace('.', '-')}"])
        section += nodes.title("", source.module)
        first_sentence = ast.get_docstring(source.tree).partition("\n\n")[0]
        section += self.raw(to_html(first_sentence, self.link((source.module, ""))))
        for name, node in source.definitions.items():
            if not any(part.startswith("_") for part in name.split(".")):
                section += self.raw(self.entry(source, name, node))
        return section

    def entry(self, source: Source, name: str, node: Definition) -> str:
        link, shown = self.link((source.module, name)), f"{source.module}.{name}"
        address = self.site.url((source.module, name), self.env.docname)
        code = highlight(signature(source, name, node), PythonLexer(), HtmlFormatter(nowrap=True))
        kind = "method" if "." in name else "definition"
        return (
            f'<div class="api {kind}" id="api.{shown}">'
            f'<div class="highlight"><pre>{code}</pre></div>'
            f'<a class="to-source" href="{escape(address)}">source</a>'
            f'<div class="prose">{to_html(ast.get_docstring(node) or "", link)}</div></div>\n'
        )


def signature(source: Source, name: str, node: Definition) -> str:
    """As it is called: of a class its constructor, or the fields that it declares."""
    keyword, returns = "", ""
    if isinstance(node, ast.ClassDef):
        keyword = "class "
        constructor = source.definitions.get(f"{name}.__init__")
        parameters = fields(node) if constructor is None else arguments(constructor)
    else:
        parameters = arguments(node)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        if is_property(node):
            return f"{name}{returns}"
    line = f"{keyword}{name}({', '.join(parameters)}){returns}"
    if len(line) <= LINE:
        return line
    inner = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{keyword}{name}(\n{inner}){returns}"


def arguments(node: ast.FunctionDef) -> list[str]:
    """Each parameter as text, without `self`."""
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    parameters = [parameter(*pair) for pair in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg == "self":
        parameters = parameters[1:]
    if a.vararg:
        parameters.append(f"*{parameter(a.vararg, None)}")
    elif a.kwonlyargs:
        parameters.append("*")
    parameters += [parameter(*pair) for pair in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return parameters + ([f"**{parameter(a.kwarg, None)}"] if a.kwarg else [])


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    equals = " = " if argument.annotation else "="
    return f"{ast.unparse(argument)}{equals}{ast.unparse(default)}"


def fields(node: ast.ClassDef) -> list[str]:
    """Of a named tuple or a data class."""
    is_tuple = any(ast.unparse(base) == "NamedTuple" for base in node.bases)
    is_data = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    declared = [s for s in node.body if isinstance(s, ast.AnnAssign)]
    return [ast.unparse(s) for s in declared] if is_tuple or is_data else []


def is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


def setup(app: Sphinx) -> dict:
    app.setup_extension("annotated")  # knows the modules
    app.add_directive("api", Api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
