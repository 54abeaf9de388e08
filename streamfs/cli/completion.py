"""completion: what a shell reads to complete streamfs' commands, options and the names of streams."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class, get_completion_class

COMPLETION_VARIABLE = "_STREAMFS_COMPLETE"
"""Set by the completion of a shell when it asks for words."""
_SHELLS = ("bash", "zsh", "fish")
_SPECIAL = re.compile(r"[^\w@%+,./-]")  # what bash gives a meaning, or breaks words at


class _Bash(BashComplete):
    """click's, with the words as bash has to read them again: names may hold spaces, stars and colons."""

    source_template: ClassVar[str] = r"""
%(complete_func)s() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case $line in
            dir,*) compopt -o dirnames ;;
            file,*) compopt -o default ;;
            plain,*) COMPREPLY+=("${line#plain,}") ;;
        esac
    done < <(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD="$COMP_CWORD" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        return self.source_template % self.source_vars()

    def format_completion(self, item: CompletionItem[Any]) -> str:
        return f"{item.type},{_SPECIAL.sub(lambda found: chr(92) + found[0], item.value)}"


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what SHELL reads to complete streamfs' words.

    \b
      bash, in ~/.bashrc:                    eval "$(streamfs completion bash)"
      zsh, in ~/.zshrc after compinit:       eval "$(streamfs completion zsh)"
      fish: streamfs completion fish > ~/.config/fish/completions/streamfs.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "streamfs", COMPLETION_VARIABLE).source().strip())


add_completion_class(_Bash)
