"""An application that sends texts of the sizes it is asked for straight to the connection."""

from typing import Any

from realtime.wire import frame_writer, to_wire


async def application(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    write = frame_writer(send)
    while (message := await receive())["type"] == "websocket.receive":
        for size in map(int, message["text"].split()):
            # What the writer does not take now goes the usual way.
            frame = as_message("é" * (size // 2) + "x" * (size % 2))
            if not write(frame):
                await send(frame)
    assert not write(as_message("too late"))


def as_message(text: str) -> dict[str, Any]:
    """Return what ``frames.text_message`` returns, without Django."""
    return {"type": "websocket.send", "text": text, "wire": to_wire(text)}
