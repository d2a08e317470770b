package org.pytorch.executorch;

/** ONLY TO COMPILE AGAINST: as much of ExecuTorch's class of this name as gemma-executorch calls. It runs nothing. */
public class Module implements java.io.Closeable {
  public static final int LOAD_MODE_MMAP = 1;

  private Module() {}

  public static Module load(String modelPath, int loadMode, int numThreads) {
    throw new UnsatisfiedLinkError("this is a double to compile against; put ExecuTorch's own classes on the class path");
  }

  public void loadMethod(String methodName) {}

  public String[] getMethods() {
    return new String[0];
  }

  public EValue[] execute(String methodName, EValue... inputs) {
    return new EValue[0];
  }

  @Override
  public void close() {}
}
