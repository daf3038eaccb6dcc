"""A chat with a long memory: what you say and show is kept on disk, and comes back when the talk comes to it.

    python examples/chat_memory.py                   # a scripted conversation, in two sessions
    python examples/chat_memory.py --chat [FOLDER]   # your own, kept in a folder; an empty line ends it

"picture FILE" shows a picture, "forget ID" forgets for good. What ends with a "?" is answered from memory (the backbone
that embeds also looks at pictures), all else is remembered. Needs FAISS: pip install ".[faiss]". Hardware: 2
CPU cores, 8 to 12 seconds. Expected output: the second session knows what was said in the first, until it forgets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from transformers import AutoProcessor

from slq_embed import SLQEncoder, pretrained
from slq_embed.generation import answer
from slq_embed.index import EmbeddingIndex
from slq_embed.inputs import read_image
from slq_embed.toy import Scene, Thing, render

SESSIONS = [
    "picture card.png; picture night.png; my tent is a green triangle; two brown diamonds are in the safe",
    "how many red hearts are there?; which colour has what twinkles at night?; what is my tent like?; "
    "what is like chocolate and a gem?; forget 4; what is like chocolate and a gem?",
]


class Chat:
    def __init__(self, folder: Path, model: SLQEncoder) -> None:
        self.pictures, self.folder, self.model = folder / "pictures", folder / "index", model
        self.processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))  # with the template for answers
        exists = (self.folder / "index.json").exists()
        self.index = EmbeddingIndex.load(self.folder, model) if exists else EmbeddingIndex(model)

    def reply(self, line: str) -> str:
        try:
            if line.startswith("forget "):
                return self.forget(line.removeprefix("forget "))
            return self.recall(line) if line.endswith("?") else self.remember(line)
        except ValueError as error:  # a picture that cannot be read
            return str(error)

    def remember(self, line: str) -> str:
        id_ = str(max(map(int, self.index.ids()), default=0) + 1)
        picture = read_image(Path(line.removeprefix("picture "))) if line.startswith("picture ") else None
        if picture:
            self.pictures.mkdir(parents=True, exist_ok=True)
            picture.save(self.pictures / f"{id_}.png")
        self.index.add([picture or line], [id_], [{"text": line, "picture": picture is not None}])
        self.index.save(self.folder)
        return f"I keep that as {id_}."

    def recall(self, question: str) -> str:
        hits = [hit for hit in self.index.search(question, k=1) if hit.score >= 0.4]
        if not hits:
            return "I remember nothing like that."
        best = hits[0]
        source = f"({best.id}, {best.score:.2f})"
        if not best.metadata["picture"]:
            return f"You said: {best.metadata['text']} {source}"
        picture = self.pictures / f"{best.id}.png"
        text = answer(self.model, question, [picture], processor=self.processor, max_new_tokens=24, do_sample=False)
        return f"In that picture I see: {text} {source}"

    def forget(self, id_: str) -> str:
        if not self.index.delete([id_]):
            return f"I remember nothing as {id_}."
        (self.pictures / f"{id_}.png").unlink(missing_ok=True)
        self.index.compact()  # leaves none of its bytes
        self.index.save(self.folder)
        return "Forgotten."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", type=Path, nargs="?", const=Path("chat-memory"), help="talk yourself; a folder")
    args = parser.parse_args(argv)
    model = SLQEncoder(pretrained("slq-tiny"))
    if args.chat:
        chat = Chat(args.chat, model)
        for line in iter(lambda: sys.stdin.readline().strip(), ""):
            print("    ", chat.reply(line))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, thing in (("card", Thing("red", "heart")), ("night", Thing("yellow", "star"))):
            render(Scene("count", thing, count=3), seed=3).save(Path(folder, f"{name}.png"))
        for session in SESSIONS:
            chat = Chat(Path(folder, "memory"), model)  # from disk, as after a restart
            print(f"A session with {len(chat.index)} memories")
            for line in session.split("; "):
                print(f"you: {line}\n     {chat.reply(line.replace('picture ', f'picture {folder}/'))}")


if __name__ == "__main__":
    main()
