// The gate view: a tooltip on hover, tap or focus, arrow keys from token to token, and the choice of a gate.
for (const view of document.querySelectorAll(".gates")) {
  const tokens = [...view.querySelectorAll(".tokens span")];
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.role = "tooltip";
  tip.hidden = true;
  document.body.append(tip);

  const show = (token) => {
    tip.textContent = token.dataset.tip;
    tip.hidden = false;
    const box = token.getClientRects()[0];
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${scrollX + Math.max(8, left)}px`;
    tip.style.top = `${scrollY + (below ? box.bottom + 8 : box.top - 8 - tip.offsetHeight)}px`;
  };
  const hide = () => { tip.hidden = true; };

  tokens.forEach((token, index) => {
    token.tabIndex = index ? -1 : 0; // one stop for the tab key; arrows do the rest
    token.setAttribute("aria-describedby", tip.id);
    token.addEventListener("pointerenter", () => show(token));
    token.addEventListener("pointerleave", hide);
    token.addEventListener("focus", () => show(token));
    token.addEventListener("blur", hide);
    token.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) tokens[index + step]?.focus();
      else if (event.key === "Escape") hide();
    });
  });
  view.addEventListener("change", (event) => {
    for (const token of tokens) token.style.setProperty("--level", token.dataset.levels.split(" ")[event.target.value]);
  });
}
