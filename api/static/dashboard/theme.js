// Runs before anything is drawn, so that a page never flashes in the other theme. Without a choice, the system's holds.
(() => {
  const chosen = localStorage.getItem("celeriac.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
