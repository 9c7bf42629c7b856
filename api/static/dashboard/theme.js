// The theme: the one that was chosen here, or else the system's. Runs before anything is drawn, so that a page never
// flashes in the other one.
(() => {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("celeriac.theme");
    } catch {
      return null; // this browser keeps nothing for sites
    }
  };
  const show = () => {
    const isChosen = chosen() === "light" || chosen() === "dark";
    document.documentElement.dataset.theme = isChosen ? chosen() : prefersDark.matches ? "dark" : "light";
  };
  show();
  prefersDark.addEventListener("change", show);
})();
