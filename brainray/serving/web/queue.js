// A queue that runs a few items at a time, and can be paused or locked.

/** Runs the added items in order, at most `parallel` at a time; `run` handles its own failures. */
export class Queue {
  isLocked = false;
  #waiting = [];
  #numRunning = 0;
  #resumeAt = 0;

  constructor(run, parallel) {
    Object.assign(this, { run, parallel });
  }

  add(items) {
    this.#waiting.push(...items);
    this.start();
  }

  /** Put an item back before all that wait, and start nothing for some time. */
  putBack(item, seconds = 0) {
    this.#waiting.unshift(item);
    this.#resumeAt = Math.max(this.#resumeAt, Date.now() + 1000 * seconds);
    setTimeout(() => this.start(), 1000 * seconds + 10);
  }

  clear() {
    this.#waiting = [];
  }

  start() {
    while (!this.isLocked && Date.now() >= this.#resumeAt && this.#numRunning < this.parallel
      && this.#waiting.length) {
      this.#numRunning += 1;
      this.run(this.#waiting.shift()).finally(() => {
        this.#numRunning -= 1;
        this.start();
      });
    }
  }
}
