// Draws what the kernel sends, and answers to pointer and keys without asking the kernel.

const NAMESPACE = "http://www.w3.org/2000/svg";

function square(index, width, inset) {
  const x = (index % width) + inset;
  const y = Math.floor(index / width) + inset;
  const side = 1 - 2 * inset;
  return `M${x} ${y}h${side}v${side}h-${side}z`;
}

function render({ model, el }) {
  const drawing = document.createElement("div");
  drawing.className = "s3lab-grid";
  drawing.tabIndex = 0;
  drawing.setAttribute("aria-label", "cells of the weight: arrow keys move, Escape lets go");
  const told = document.createElement("output");
  told.className = "s3lab-told";
  el.append(drawing, told);
  let overlay = null;

  function paths(...kinds) {
    const group = document.createElementNS(NAMESPACE, "g");
    for (const [kind, outline] of kinds) {
      const path = document.createElementNS(NAMESPACE, "path");
      path.setAttribute("class", `s3lab-${kind}`);
      path.setAttribute("d", outline);
      group.append(path);
    }
    return group;
  }

  function light(index) {
    overlay?.remove();
    overlay = null;
    const { scope, block, offset, width, columns } = model.get("cells");
    if (!(index >= 0 && index < offset.length)) {
      told.value = "point at a cell, or move with the arrow keys";
      return;
    }
    let apart = "";
    let together = "";
    for (let i = 0; i < offset.length; i++) {
      if (scope[i] !== scope[index]) apart += square(i, width, 0);
      else if (block[i] === block[index]) together += square(i, width, 0.08);
    }
    overlay = paths(["apart", apart], ["together", together], ["chosen", square(index, width, 0.25)]);
    drawing.querySelector("svg").append(overlay);
    const at = offset[index];
    told.value =
      `row ${Math.floor(at / columns)}, column ${at % columns}: offset ${at}, ` +
      `block ${block[index]} of scope ${scope[index]}`;
  }

  function locate(event) {
    const svg = drawing.querySelector("svg");
    const { width, offset } = model.get("cells");
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const [x, y] = [Math.floor(point.x), Math.floor(point.y)];
    const index = y * width + x;
    return x >= 0 && x < width && y >= 0 && index < offset.length ? index : -1;
  }

  function pick(index) {
    model.set("picked", index);
    model.save_changes();
  }

  function redraw() {
    overlay = null;
    drawing.innerHTML = model.get("svg");
    light(model.get("picked"));
  }

  drawing.addEventListener("pointermove", (event) => light(locate(event)));
  drawing.addEventListener("pointerleave", () => light(model.get("picked")));
  drawing.addEventListener("click", (event) => pick(locate(event)));
  drawing.addEventListener("keydown", (event) => {
    const { width, offset } = model.get("cells");
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width };
    const now = model.get("picked");
    if (event.key === "Escape") pick(-1);
    else if (!(event.key in steps)) return;
    else if (now < 0) pick(0);
    else if (now + steps[event.key] >= 0 && now + steps[event.key] < offset.length) pick(now + steps[event.key]);
    event.preventDefault();
    event.stopPropagation();
  });
  model.on("change:svg", redraw);
  model.on("change:picked", () => light(model.get("picked")));
  redraw();
}

export default { render };
