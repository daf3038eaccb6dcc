"""A chat with a long memory: what you say and show is kept on disk, and comes back when the talk comes to it.

    python examples/chat_memory.py                   # a scripted conversation, in two sessions
    python examples/chat_memory.py --chat [FOLDER]   # your own, kept in a folder; an empty line ends it

"picture FILE" shows a picture, "forget ID" forgets for good. What ends with a "?" is answered from memory (the backbone
that embeds also looks at pictures), all else is remembered. Needs FAISS: pip install "slq-embed[faiss]". Hardware: 2
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
        self.pictures, self.kept, self.model = folder / "pictures", folder / "index", model
        self.processor = AutoProcessor.from_pretrained(pretrained("mllm-tiny"))  # with the template for answers
        there = (self.kept / "index.json").exists()
        self.index = EmbeddingIndex.load(self.kept, model) if there else EmbeddingIndex(model)

    def reply(self, said: str) -> str:
        try:
            if said.startswith("forget "):
                return self.forget(said.removeprefix("forget "))
            return self.recall(said) if said.endswith("?") else self.remember(said)
        except ValueError as error:  # a picture that cannot be read
            return str(error)

    def remember(self, said: str) -> str:
        id_ = str(max(map(int, self.index.ids()), default=0) + 1)
        picture = read_image(Path(said.removeprefix("picture "))) if said.startswith("picture ") else None
        if picture:
            self.pictures.mkdir(parents=True, exist_ok=True)
            picture.save(self.pictures / f"{id_}.png")
        self.index.add([picture or said], [id_], [{"said": said, "picture": picture is not None}])
        self.index.save(self.kept)
        return f"I keep that as {id_}."

    def recall(self, question: str) -> str:
        hits = [hit for hit in self.index.search(question, k=1) if hit.score >= 0.4]
        if not hits:
            return "I remember nothing like that."
        where, picture = f"({hits[0].id}, {hits[0].score:.2f})", self.pictures / f"{hits[0].id}.png"
        if not hits[0].metadata["picture"]:
            return f"You said: {hits[0].metadata['said']} {where}"
        said = answer(self.model, question, [picture], processor=self.processor, max_new_tokens=24, do_sample=False)
        return f"In that picture I see: {said} {where}"

    def forget(self, id_: str) -> str:
        if not self.index.delete([id_]):
            return f"I remember nothing as {id_}."
        (self.pictures / f"{id_}.png").unlink(missing_ok=True)
        self.index.compact()  # leaves none of its bytes
        self.index.save(self.kept)
        return "Forgotten."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", type=Path, nargs="?", const=Path("chat-memory"), help="talk yourself; a folder")
    args = parser.parse_args()
    model = SLQEncoder(pretrained("slq-tiny"))
    if args.chat:
        chat = Chat(args.chat, model)
        for said in iter(lambda: sys.stdin.readline().strip(), ""):
            print("    ", chat.reply(said))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, thing in (("card", Thing("red", "heart")), ("night", Thing("yellow", "star"))):
            render(Scene("count", thing, count=3), seed=3).save(Path(folder, f"{name}.png"))
        for session in SESSIONS:
            chat = Chat(Path(folder, "memory"), model)  # from disk, as after a restart
            print(f"A session with {len(chat.index)} memories")
            for said in session.split("; "):
                print(f"you: {said}\n     {chat.reply(said.replace('picture ', f'picture {folder}/'))}")


if __name__ == "__main__":
    main()
